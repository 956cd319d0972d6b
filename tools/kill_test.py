#!/usr/bin/env python3
"""Kill a small training at random moments, resume it, and compare its final checkpoint with an uninterrupted run's.

Each round trains from the start, is killed with SIGKILL, and is resumed until the end. In every second round the kill
comes while a checkpoint is being written, which is slowed down for that; in every fourth round the newest checkpoint is
also truncated, as by a failing disk. The number of data loading workers changes at random. Exit code 0: all final
checkpoints are bit-equal, and each run resumed from its newest readable checkpoint.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import halodet.engine.trainer
from halodet.checkpoint import Checkpointer, read_checkpoint
from halodet.data import write_shapes

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_net import main as train  # noqa: E402

SMALL = [
    "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "SOLVER.WARMUP_ITERS", "5", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "4",
    "SOLVER.CHECKPOINT_MAX_TO_KEEP", "3", "DATASETS.TEST", "()", "SEED", "3",
]  # fmt: skip
CONFIG = "quick/mask_rcnn_halo_shapes"
WRITE_SECONDS = 0.4  # duration of writing a checkpoint, and again until its tag is written


class SlowCheckpointer(Checkpointer):
    """Writes a checkpoint in ten pieces with pauses, and pauses before the tag."""

    def write(self, data: dict, file: str) -> None:
        buffer = io.BytesIO()
        torch.save(data, buffer)
        content = buffer.getbuffer()
        size = len(content) // 10 + 1
        with open(file, "wb", buffering=0) as opened:
            for start in range(0, len(content), size):
                opened.write(content[start : start + size])
                time.sleep(WRITE_SECONDS / 10)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        time.sleep(WRITE_SECONDS)
        super().tag_last_checkpoint(last_filename_basename)


def start(arguments: list[str], log: Path, *, slow: bool = False) -> multiprocessing.Process:
    """Start tools/train_net.py in a forked process, which has imported everything."""

    def run() -> None:
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        torch.set_num_threads(1)
        if slow:
            halodet.engine.trainer.Checkpointer = SlowCheckpointer
        os._exit(train(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finish(arguments: list[str], log: Path) -> None:
    """Train until the end."""
    process = start(arguments, log)
    process.join()
    if process.exitcode:
        sys.exit(f"error: training ended with exit code {process.exitcode}:\n{log.read_text()[-2000:]}")


def kill(
    process: multiprocessing.Process, folder: Path, rng: random.Random, seconds: float, while_writing: bool
) -> str:
    """Send SIGKILL at a random moment; return what the process was doing."""

    def wait_until(condition: Callable[[], bool]) -> None:
        while process.is_alive() and not condition():
            time.sleep(0.005)

    log = folder / "log.txt"
    wait_until(lambda: log.exists() and "Starting training" in log.read_text())
    if while_writing:
        for _ in range(rng.randrange(3) + 1):
            wait_until(lambda: not list(folder.glob(".model_*.part")))
            wait_until(lambda: bool(list(folder.glob(".model_*.part"))))
        seconds = 2 * WRITE_SECONDS
    time.sleep(rng.uniform(0, seconds))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return "writing" if list(folder.glob(".model_*.part")) else "training"


def differing(left: object, right: object, name: str = "") -> list[str]:
    """Return the names of the entries in which two checkpoints differ, except for the start time of the run."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        keys = [key for key in left if key != "started"]
        return [found for key in keys for found in differing(left[key], right[key], f"{name}.{key}")]
    if isinstance(left, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for i, pair in pairs for found in differing(*pair, f"{name}.{i}")]
    same = torch.equal(left, right) and left.dtype == right.dtype if isinstance(left, torch.Tensor) else left == right
    return [] if same else [name]


def run_round(
    number: int, arguments: list[str], folder: Path, rng: random.Random, seconds: float, expected: dict
) -> list:
    """Kill and resume one run; return whether it resumed from the right checkpoint and ended bit-equal."""
    workers = [str(rng.choice((0, 2))) for _ in range(2)]
    arguments = [*arguments, "OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS"]
    process = start([*arguments, workers[0]], folder.with_suffix(".1.log"), slow=True)
    doing = kill(process, folder, rng, seconds, while_writing=number % 2 == 1)
    checkpoints = sorted(folder.glob("model_*.pth"))
    if number % 4 == 3 and len(checkpoints) > 1:
        damaged = checkpoints.pop()
        os.truncate(damaged, rng.randrange(damaged.stat().st_size))
        doing += ", newest truncated"
    log = folder.with_suffix(".2.log")
    finish(["--resume", *arguments, workers[1]], log)
    source = re.search(r"\[DetectionCheckpointer\] Loading from \S*?(model_\w+\.pth)", log.read_text())
    source = source[1] if source else "the start"
    newest = checkpoints[-1].name if checkpoints else "the start"  # model_final.pth sorts last
    different = differing(expected, read_checkpoint(folder / "model_final.pth"))
    doing += f"; resumed from {source}; different entries: {len(different)} {different[:3]}"
    print(f"kill {number + 1}, {'/'.join(workers)} workers: {doing}", flush=True)
    return source == newest and not different


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--kills", type=int, default=20, help="number of rounds (default: 20)")
    parser.add_argument("--iterations", type=int, default=32, help="iterations of each training (default: 32)")
    args = parser.parse_args(argv)
    output = Path(tempfile.mkdtemp(prefix="kill_test_"))
    data = ["--train-json", str(write_shapes(output / "shapes", "train", 16))]
    data += ["--train-images", str(output / "shapes" / "train")]
    arguments = ["--config-file", CONFIG, *data, *SMALL, "SOLVER.MAX_ITER", str(args.iterations)]
    rng = random.Random(args.seed)
    rounds = []
    try:
        begun = time.perf_counter()
        finish([*arguments, "OUTPUT_DIR", str(output / "whole")], output / "whole.log")
        seconds = time.perf_counter() - begun
        print(f"uninterrupted: {args.iterations} iterations in {seconds:.0f} s", flush=True)
        expected = read_checkpoint(output / "whole" / "model_final.pth")
        for number in range(args.kills):
            folder = output / f"round{number + 1:02d}"
            rounds.append(run_round(number, arguments, folder, rng, seconds, expected))
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    right = sum(rounds)
    print(f"seed {args.seed}: {right} of {args.kills} bit-equal to the uninterrupted run")
    return 0 if right == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
