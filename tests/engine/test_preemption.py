"""SIGTERM and SIGUSR1 to one process, to a process group, and to the parent of --num-gpus."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from halodet.engine import PREEMPTED

import pytest
from helpers import ROOT, dataset_flags, run_python

pytestmark = pytest.mark.distributed
OPTS = [
    "--config-file", "quick/mask_rcnn_halo_shapes", "MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3000", "SOLVER.CHECKPOINT_PERIOD", "3000",
    "DATALOADER.NUM_WORKERS", "2", "MODEL.DEVICE", "cpu",
]  # fmt: skip
TOOL = [ROOT / "tools/train_net.py"]
SPAWNED = [Path(__file__).with_name("two_ranks.py"), "train_spawned"]


@pytest.fixture
def run(tmp_path, request):
    """A run with two data loading workers, in a process group of its own, once it has trained for some iterations."""
    data = dataset_flags(tmp_path / "data", 4)[:2]
    with open(tmp_path / "printed.txt", "w") as printed:
        process = subprocess.Popen(
            [sys.executable, *request.param, *data, *OPTS, "OUTPUT_DIR", tmp_path],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
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


def assert_preempted(run, folder):
    code = run.wait(timeout=100)
    text = (folder / "printed.txt").read_text()
    assert code == PREEMPTED and "Traceback" not in text and text.count("Stopped by SIG") == 1, text
    assert len(list(folder.glob("model_*.pth"))) == 1


@pytest.mark.parametrize("run", [TOOL], indirect=True, ids=["alone"])
def test_signals_to_the_process_group_save_one_checkpoint(run, tmp_path):
    run.send_signal(signal.SIGSTOP)  # so that both arrive within one iteration
    os.killpg(run.pid, signal.SIGTERM)
    run.send_signal(signal.SIGUSR1)
    run.send_signal(signal.SIGCONT)
    assert_preempted(run, tmp_path)


@pytest.mark.parametrize("run", [SPAWNED], indirect=True, ids=["spawned"])
def test_a_signal_to_the_parent_reaches_the_ranks(run, tmp_path):
    run.send_signal(signal.SIGTERM)
    assert_preempted(run, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_outside_of_training(number):
    code = "from halodet.engine.preemption import *\nwith exit_on_preemption(): os.kill(os.getpid(), {})\nprint('late')"
    run = run_python("-c", code.format(int(number)))
    assert run.returncode == PREEMPTED and number.name in run.stderr and not run.stdout, run.stderr
