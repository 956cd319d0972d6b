"""Two ranks that train with NaN images on the second one; started by test_nan_guard.py."""

import json
import os
from datetime import timedelta
from pathlib import Path

from halodet.engine.distributed import detect_dist_env, init_distributed

import torch.distributed as dist
from detectron2.utils import comm
from small_run import all_finite, inject_nan, make_trainer, record_steps


def work(images, folder, runs):
    """Train each of ``runs`` (name -> config keys) on the images below ``images``; write ``folder``/RANK.json."""
    init_distributed(detect_dist_env(), timedelta(minutes=2))
    os.chdir(images)
    rank = comm.get_rank()
    results = {name: train(Path(folder) / name, keys, [3] if rank == 1 else []) for name, keys in runs.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def train(folder, keys, bad_batches):
    trainer = make_trainer(folder, keys)
    inject_nan(trainer, bad_batches)
    error, steps = "", record_steps(trainer)
    try:
        trainer.train()
    except RuntimeError as caught:
        error = str(caught)
    weights = sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())
    return {"error": error, "steps": steps, "finite": all_finite(trainer), "weights": weights}
