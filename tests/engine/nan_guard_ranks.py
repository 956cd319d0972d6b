"""One of two processes of a run in which losses become NaN on the other one: see test_finite.py."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.utils import comm

sys.path.insert(0, str(Path(__file__).parent))
from small_run import make_trainer, spoil  # noqa: E402


def work(rank, folder, keys, policies, bad):
    """Train once with each policy; write what came of it to ``folder``/RANK.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    defaults.create_ddp_model = partial(defaults.create_ddp_model, device_ids=None)  # which Detectron2's takes for GPUs
    told = {
        policy: train(Path(folder) / policy, {**keys, "SOLVER.NON_FINITE_POLICY": policy}, bad if rank == 1 else [])
        for policy in policies
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(told))


def train(folder, keys, bad):
    """The error, the iterations in which the optimizer made a step, and what is left."""
    trainer = make_trainer(folder, keys)
    spoil(trainer, bad)
    error, steps = "", []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.iter))
    try:
        trainer.train()
    except RuntimeError as caught:
        error = str(caught)
    state = trainer.model.state_dict().values()
    weights = sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())
    return {"error": error, "steps": steps, "finite": all(bool(v.isfinite().all()) for v in state), "weights": weights}


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1], *map(json.loads, sys.argv[2:])), nprocs=2)
