"""Two ranks that train with NaN images on the second one; started by test_nan_guard.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from small_run import all_finite, inject_nan, make_trainer, record_steps  # noqa: E402


def work(rank, folder, runs):
    """Train each of ``runs`` (name -> config keys) and write what came of them to ``folder``/RANK.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    comm.create_local_process_group(2)
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


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1], json.loads(sys.argv[2])), nprocs=2)
