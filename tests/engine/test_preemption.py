"""SIGTERM and SIGUSR1 to one process, to a process group, and to the parent of --num-gpus."""

import os
import signal
import subprocess
import sys
import time

from halodet.engine import PREEMPTED

import pytest
import two_ranks
from helpers import ROOT, dataset_flags, fork

pytestmark = pytest.mark.distributed
OPTS = [
    "--config-file", "quick/mask_rcnn_halo_shapes", "MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3000", "SOLVER.CHECKPOINT_PERIOD", "3000",
    "DATALOADER.NUM_WORKERS", "2", "MODEL.DEVICE", "cpu",
]  # fmt: skip


def started(is_running, *logs):
    """Wait until all processes of a run train, each of which writes one of ``logs``."""
    deadline = time.monotonic() + 200
    while not all(f.exists() and "Starting training" in f.read_text() for f in logs):
        assert is_running() and time.monotonic() < deadline, logs[0].read_text()
        time.sleep(0.05)


def assert_preempted(code, folder):
    text = (folder / "printed.txt").read_text()
    assert code == PREEMPTED and "Traceback" not in text and text.count("Stopped by SIG") == 1, text
    assert len(list(folder.glob("model_*.pth"))) == 1


def test_ctrl_c_saves_a_checkpoint(tmp_path):
    data = dataset_flags(tmp_path / "data", 4)[:2]
    command = [sys.executable, "tools/train_net.py", *data, *OPTS, "OUTPUT_DIR", str(tmp_path)]
    code = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({command[0]!r}, {command!r})"
    with open(tmp_path / "printed.txt", "w") as printed:
        run = subprocess.Popen(
            [sys.executable, "-c", code],  # tests in the background ignore Ctrl-C
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        started(lambda: run.poll() is None, tmp_path / "printed.txt")
        os.killpg(run.pid, signal.SIGINT)
        code = run.wait(timeout=100)
        text = (tmp_path / "printed.txt").read_text()
        assert code == 130 and "Traceback" not in text and "Stopped by SIGINT" in text, text
        assert len(list(tmp_path.glob("model_*.pth"))) == 1
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def test_signals_to_the_process_group_save_one_checkpoint(tmp_path):
    data = dataset_flags(tmp_path / "data", 4)[:2]
    with open(tmp_path / "printed.txt", "w") as printed:
        run = subprocess.Popen(
            [sys.executable, "tools/train_net.py", *data, *OPTS, "OUTPUT_DIR", tmp_path],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            cwd=ROOT,
            start_new_session=True,  # a process group of its own, with its data loading workers
        )
    try:
        started(lambda: run.poll() is None, tmp_path / "printed.txt")
        run.send_signal(signal.SIGSTOP)  # so that both arrive within one iteration
        os.killpg(run.pid, signal.SIGTERM)
        run.send_signal(signal.SIGUSR1)
        run.send_signal(signal.SIGCONT)
        assert_preempted(run.wait(timeout=100), tmp_path)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def test_a_signal_to_the_parent_reaches_the_ranks(tmp_path):
    data = dataset_flags(tmp_path / "data", 4)[:2]
    arguments = [*data, *OPTS, "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "0"]
    run = fork(two_ranks.train_spawned, *arguments, printed=tmp_path / "printed.txt")
    try:
        started(run.is_alive, tmp_path / "printed.txt", tmp_path / "log.txt.rank1")
        os.kill(run.pid, signal.SIGTERM)
        run.join(100)
        assert_preempted(run.exitcode, tmp_path)
    finally:
        run.terminate()  # the parent forwards it
        run.join(30)
        run.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_outside_of_training(number, tmp_path):
    run = fork(two_ranks.leave, int(number), printed=tmp_path / "printed.txt")
    run.join(60)
    text = (tmp_path / "printed.txt").read_text()
    assert run.exitcode == PREEMPTED and number.name in text and "late" not in text, text
