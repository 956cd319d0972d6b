"""A short training on synthetic shapes, with one tiling per kernel."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context
from halodet.benchmark.gpu_check.runner import run_command

ITERATIONS = 50
TINY = ["MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "1"]


def items(context: Context) -> Items:
    iterations, device = (2, "cpu") if context.dry_run else (ITERATIONS, "cuda")
    command = [sys.executable, "-m", "halodet.benchmark.gpu_check.single_tiling", "tools/train_net.py"]
    command += ["--config-file", "quick/mask_rcnn_halo_shapes", "MODEL.DEVICE", device, "DATASETS.TEST", "()"]
    command += ["SOLVER.MAX_ITER", str(iterations), "OUTPUT_DIR", str(context.output / "train")]
    if context.dry_run:
        context.replace("Triton backend: the CPU's backend, on small images")
        command += TINY
    yield f"{iterations} iterations", partial(train, command, context)


def train(command: list[str], context: Context) -> dict[str, Any]:
    """Return loss and seconds per iteration of the last logged iteration."""
    log, metrics = context.output / "train_net.log", context.output / "train" / "metrics.json"
    for old in (log, metrics):
        old.unlink(missing_ok=True)
    code = run_command(command, log, max(1.0, context.time_left()), dict(os.environ))
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text[-20000:])
    figures: dict[str, Any] = {}
    if metrics.exists():
        last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
        figures = {"loss": last.get("total_loss"), "worst": last.get("time")}
    if code != 0:
        figures["failed"] = "timed out" if code is None else f"ended with code {code}, see {log.name}"
    elif "falling back to a slower halo attention backend" in text:
        figures["failed"] = "the model did not use the Triton backend"
    elif figures.get("loss") is None or not abs(figures["loss"]) < 1e6:
        figures["failed"] = f"loss {figures.get('loss')}, expected a finite number"
    return figures
