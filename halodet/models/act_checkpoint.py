"""Stages that keep only the inputs of their blocks while training, and compute the rest again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def check_stages(stages: Sequence[str], known: Sequence[str], key: str) -> None:
    """Raise ValueError if ``stages``, the value of ``key``, names something that is not in ``known``."""
    if isinstance(stages, str) or not set(stages) <= set(known):
        raise ValueError(f"{key} is {stages!r}, expected a list of stages out of {list(known)}, or []")


def run_stage(stage: nn.Sequential, x: Tensor, *, recompute: bool) -> Tensor:
    """``stage(x)``; with ``recompute``, and while gradients are wanted, the activations inside its blocks are not kept.

    Losses, gradients and statistics are those of the plain stage: random numbers are drawn alike the second time, and batch norms do not
    take the second pass into their running statistics.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv 1604.06174), through torch.utils.checkpoint.
    """
    if not (recompute and stage.training and torch.is_grad_enabled()):
        return stage(x)
    for block in stage:
        if torch.compiler.is_compiling():  # the compiled backward pass repeats no statistics, and takes no contexts
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
    return x


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """For the first pass, and for the second one."""
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    # Not track_running_stats: Detectron2's NaiveSyncBatchNorm does not look at it, and PyTorch's norms keep fewer tensors without it.
    # Passes are counted in a tensor of no further use.
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
