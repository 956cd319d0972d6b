"""Activation checkpointing: keep only the inputs of blocks in training and recompute the rest in the backward pass."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Stage(nn.Sequential):
    """Blocks in sequence.

    Args:
        blocks: blocks.
        use_act_checkpoint: recompute the activations inside the blocks in the backward pass.
    """

    def __init__(self, *blocks: nn.Module, use_act_checkpoint: bool = False) -> None:
        super().__init__(*blocks)
        self.use_act_checkpoint = use_act_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            pass
        elif self.use_act_checkpoint:
            return run_blocks(self, x)
        for block in self:
            x = block(x)
        return x


def check_stages(stages: Sequence[str], known: Sequence[str], key: str) -> None:
    """Raise ValueError if ``stages``, the value of ``key``, names something that is not in ``known``."""
    if isinstance(stages, str) or not set(stages) <= set(known):
        raise ValueError(f"{key}={stages!r} is invalid: expected a list of stages from {list(known)}, or []")


def run_blocks(stage: nn.Module, x: Tensor) -> Tensor:
    """Run the children of ``stage`` in sequence; in training, recompute the activations inside them backward.

    Losses, gradients and running statistics equal those of the plain stage: random number states are restored for the
    second pass, and batch norms ignore it.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv 1604.06174), through
    torch.utils.checkpoint.
    """
    recompute = stage.training and torch.is_grad_enabled()
    for block in stage.children():
        if not recompute:
            x = block(x)
            continue
        if torch.compiler.is_compiling():  # a compiled backward pass does not repeat statistics and takes no contexts
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))
    return x


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of the first pass and of the recomputation."""
    return contextlib.nullcontext(), _keep_statistics(block)


@contextlib.contextmanager
def _keep_statistics(block: nn.Module) -> Iterator[None]:
    # Not track_running_stats: Detectron2's NaiveSyncBatchNorm ignores it, and PyTorch's norms save fewer tensors
    # without it.
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
