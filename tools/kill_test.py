#!/usr/bin/env python3
"""Kill a small training at random moments, go on with --resume, and compare its final checkpoint with the uninterrupted run's, bit for bit.

Each round trains anew, is killed with SIGKILL, and goes on until the end. In every second round the kill comes while a checkpoint is being
written, which is made slow for that; in every fourth one the newest checkpoint is then cut short too, as a failing disk would. The number
of loading workers changes from start to start. The exit code is 0 where every round ends with the same bits.
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
from pathlib import Path

import halodet.engine.trainer
from halodet.checkpoint import Checkpointer, read_checkpoint
from halodet.engine import load_config, prepare_datasets
from halodet.errors import CheckpointError

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_net import main as train  # noqa: E402

SMALL = [
    "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.WARMUP_ITERS", "5", "SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.CHECKPOINT_MAX_TO_KEEP", "3", "DATASETS.TEST", "()", "SEED", "3",
]  # fmt: skip
WRITING = 0.4  # seconds that a checkpoint takes to write, and again from its renaming to its tag's


class SlowCheckpointer(Checkpointer):
    """Writes a checkpoint in ten pieces, with pauses, and waits before the tag."""

    def write(self, data: dict, file: str) -> None:
        buffer = io.BytesIO()
        torch.save(data, buffer)
        content = buffer.getbuffer()
        piece = len(content) // 10 + 1
        with open(file, "wb", buffering=0) as opened:
            for start in range(0, len(content), piece):
                opened.write(content[start : start + piece])
                time.sleep(WRITING / 10)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        time.sleep(WRITING)
        super().tag_last_checkpoint(last_filename_basename)


def start(arguments: list[str], log: Path, *, slow: bool) -> multiprocessing.Process:
    """tools/train_net.py in a process of its own, forked so that nothing is imported again."""

    def run() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        if slow:
            halodet.engine.trainer.Checkpointer = SlowCheckpointer
        os._exit(train(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finish(arguments: list[str], log: Path) -> None:
    process = start(arguments, log, slow=False)
    process.join()
    if process.exitcode:
        sys.exit(
            f"error: the training ended with exit code {process.exitcode}; the end of its log:\n{log.read_text()[-2000:]}"
        )


def kill(
    process: multiprocessing.Process, folder: Path, chance: random.Random, *, duration: float, while_writing: bool
) -> str:
    """SIGKILL at a random moment; returns what was being done."""
    if while_writing:
        place = chance.randrange(3)  # of the run's checkpoints
        for _ in range(place + 1):
            _wait_until(lambda: not list(folder.glob(".model_*.part")), process)
            _wait_until(lambda: bool(list(folder.glob(".model_*.part"))), process)
        time.sleep(chance.uniform(0, 2 * WRITING))
    else:
        _wait_until(
            lambda: (folder / "log.txt").exists() and "Starting training" in (folder / "log.txt").read_text(), process
        )
        time.sleep(chance.uniform(0, duration))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    half = [path.stat().st_size for path in folder.glob(".model_*.part")]
    if half:
        return f"writing, {half[0] / 2**20:.1f} MiB done"
    tag = (folder / "last_checkpoint").read_text() if (folder / "last_checkpoint").exists() else ""
    newest = max((path.name for path in folder.glob("model_0*.pth")), default="")
    return "before the tag" if newest > tag and tag != "model_final.pth" else "training"


def _wait_until(condition, process: multiprocessing.Process) -> None:  # noqa: ANN001
    while process.is_alive() and not condition():
        time.sleep(0.005)


def readable(path: Path) -> bool:
    try:
        return "trainer" in read_checkpoint(path)
    except CheckpointError:
        return False


def differing(left: object, right: object, name: str = "") -> list[str]:
    """Names of what is not the same in two checkpoints; when a run was started is not compared."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [
            found for key in left if key != "started" for found in differing(left[key], right[key], f"{name}.{key}")
        ]
    if isinstance(left, list | tuple) and len(left) == len(right):
        return [
            found for i, pair in enumerate(zip(left, right, strict=True)) for found in differing(*pair, f"{name}.{i}")
        ]
    same = torch.equal(left, right) and left.dtype == right.dtype if isinstance(left, torch.Tensor) else left == right
    return [] if same else [name]


def round_(
    number: int, arguments: list[str], folder: Path, chance: random.Random, duration: float, expected: dict
) -> tuple[list, bool]:
    """One killed and resumed run: (row of the table, whether all was well)."""
    workers = [str(chance.choice((0, 2))) for _ in range(2)]
    arguments = [*arguments, "OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS"]
    while_writing, damage = number % 2 == 1, number % 4 == 3
    process = start([*arguments, workers[0]], folder.with_suffix(".1.log"), slow=True)
    doing = kill(process, folder, chance, duration=duration, while_writing=while_writing)
    checkpoints = sorted(folder.glob("model_*.pth"))
    if damage and len(checkpoints) > 1:
        size = checkpoints[-1].stat().st_size
        os.truncate(checkpoints[-1], chance.randrange(size))
        doing += f"; {checkpoints[-1].name} cut short"
    good = {path.name for path in checkpoints if readable(path)}
    log = folder.with_suffix(".2.log")
    finish(["--resume", *arguments, workers[1]], log)
    chosen = re.findall(r"\[DetectionCheckpointer\] Loading from \S*?(model_\w+\.pth)", log.read_text())
    chosen = chosen[0] if chosen else "the beginning"
    wanted = max(good - {"model_final.pth"}, default="the beginning")
    right = chosen in ({"model_final.pth"} if "model_final.pth" in good else {wanted})
    different = differing(expected, read_checkpoint(folder / "model_final.pth"))
    row = [
        number + 1,
        "/".join(workers),
        doing,
        len(checkpoints) - len(good),
        chosen,
        "yes" if right else "NO",
        len(different),
    ]
    print(
        f"kill {row[0]}: {doing}; went on from {chosen}; entries that differ: {len(different)} {different[:3] or ''}",
        flush=True,
    )
    return row, right and not different


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--iterations", type=int, default=32, help="of each training (default: 32)")
    parser.add_argument(
        "--config-file", default="quick/mask_rcnn_halo_shapes", help="what to train, made small (default: %(default)s)"
    )
    parser.add_argument("--output", help="folder for runs and logs, kept (default: a temporary one, removed)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    output = Path(args.output or tempfile.mkdtemp(prefix="kill_test_"))
    output.mkdir(parents=True, exist_ok=True)
    arguments = ["--config-file", args.config_file, *SMALL, "SOLVER.MAX_ITER", str(args.iterations), *args.opts]
    prepare_datasets(load_config(args.config_file, arguments[2:]))
    chance = random.Random(args.seed)
    try:
        begun = time.perf_counter()
        finish([*arguments, "OUTPUT_DIR", str(output / "whole")], output / "whole.log")
        # Slow checkpoints make the killed run longer than this one.
        duration = (time.perf_counter() - begun) + 2 * WRITING * args.iterations / 4
        print(f"uninterrupted: {args.iterations} iterations in {time.perf_counter() - begun:.0f} s", flush=True)
        expected = read_checkpoint(output / "whole" / "model_final.pth")
        rounds = []
        for number in range(args.kills):
            folder = output / f"round{number + 1:02d}"
            rounds.append(round_(number, arguments, folder, chance, duration, expected))
            if not args.output:
                shutil.rmtree(folder)
    finally:
        if not args.output:
            shutil.rmtree(output, ignore_errors=True)
    header = ["kill", "workers", "killed while", "unreadable", "went on from", "newest readable", "entries that differ"]
    print(tabulate([row for row, _ in rounds], header, tablefmt="simple"))
    well = sum(well for _, well in rounds)
    print(
        f"seed {args.seed}: {well} of {args.kills} bit-equal to the uninterrupted run, from the newest readable checkpoint each"
    )
    return 0 if well == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
