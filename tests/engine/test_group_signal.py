"""Signals as they come from outside: to the tool, to its whole process group, and twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from halodet.data import write_shapes
from halodet.engine import PREEMPTED

import pytest

ROOT = Path(__file__).parents[2]
TOOL = [ROOT / "tools/train_net.py"]
SPAWNED = [Path(__file__).with_name("spawned.py")]
# No second signal is taken for the first one, as it would be within seconds.
HASTY = [
    "-c",
    "import sys; from halodet.engine import preemption; preemption.SAME_REQUEST = 0.0; "
    f"sys.path.insert(0, {str(ROOT / 'tools')!r}); import train_net; sys.exit(train_net.main())",
]
OPTS = [
    "MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "100000",
    "SOLVER.CHECKPOINT_PERIOD", "100000", "DATALOADER.NUM_WORKERS", "2", "MODEL.DEVICE", "cpu",
]  # fmt: skip


@pytest.fixture
def run(tmp_path, request):
    """A run, once it has trained for some iterations with two loading workers, in a process group of its own."""
    data = ["--train-json", write_shapes(tmp_path / "data", "train", 4), "--train-images", tmp_path / "data" / "train"]
    tool = [sys.executable, *request.param, "--config-file", "quick/mask_rcnn_halo_shapes"]
    with open(tmp_path / "printed.txt", "w") as printed:
        process = subprocess.Popen(
            [*tool, *data, "OUTPUT_DIR", tmp_path, *OPTS],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=ROOT,
            start_new_session=True,
        )
    metrics, deadline = tmp_path / "metrics.json", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ended_with_a_checkpoint(run, folder):
    code = run.wait(timeout=100)
    text = (folder / "printed.txt").read_text()
    assert code == PREEMPTED and "Traceback" not in text, text
    assert "SIGTERM: stopping after this iteration" in text and len(list(folder.glob("model_*.pth"))) == 1


@pytest.mark.parametrize("run", [TOOL], indirect=True, ids=["alone"])
def test_a_signal_to_all_processes_of_a_run_ends_it_with_a_checkpoint(run, tmp_path):
    os.killpg(run.pid, signal.SIGTERM)
    ended_with_a_checkpoint(run, tmp_path)


@pytest.mark.parametrize("run", [SPAWNED], indirect=True, ids=["spawned"])
def test_a_signal_to_the_process_that_started_the_others_is_theirs(run, tmp_path):
    run.send_signal(signal.SIGTERM)
    ended_with_a_checkpoint(run, tmp_path)


def twice(run):
    run.send_signal(signal.SIGSTOP)  # so that both arrive within one iteration
    run.send_signal(signal.SIGUSR1)
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("run", [TOOL], indirect=True, ids=["alone"])
def test_what_arrives_twice_within_seconds_is_one_request(run, tmp_path):
    twice(run)
    assert run.wait(timeout=100) == PREEMPTED
    assert len(list(tmp_path.glob("model_*.pth"))) == 1


@pytest.mark.parametrize("run", [HASTY], indirect=True, ids=["alone"])
def test_a_second_request_ends_it_at_once(run, tmp_path):
    twice(run)
    assert run.wait(timeout=100) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("model_*.pth"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_stopped_while_it_starts_says_that_it_can_be_tried_again(tmp_path, number):
    starting = (
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import train_net; "
        f"train_net.Trainer.build_model = lambda *_: os.kill(os.getpid(), {number}); sys.exit(train_net.main())"
    )
    data = ["--train-json", write_shapes(tmp_path / "data", "train", 4), "--train-images", tmp_path / "data" / "train"]
    command = [
        sys.executable,
        "-c",
        starting,
        "--config-file",
        "quick/mask_rcnn_halo_shapes",
        *data,
        "OUTPUT_DIR",
        tmp_path / "run",
        *OPTS,
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert run.returncode == PREEMPTED and f"{number.name}: stopped, not in training" in run.stderr, run.stderr
    assert not list((tmp_path / "run").glob("model_*.pth"))
