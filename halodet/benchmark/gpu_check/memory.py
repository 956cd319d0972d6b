"""Memory that kernels take outside PyTorch's allocator, such as the stack of spilled registers."""

from __future__ import annotations

import functools
from typing import Any

from halodet.attention.triton_ops import halo_attention_triton
from halodet.benchmark.gpu_check.cases import SMALL, AttentionCase, attend
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context
from halodet.benchmark.gpu_check.equal_bits import CASES
from halodet.benchmark.gpu_check.tilings import combine_tilings, describe, pinned

import torch
from torch import Tensor

LIMIT = 256  # MiB


def items(context: Context) -> Items:
    for case in [SMALL] if context.dry_run else CASES:
        inputs = case.make_inputs(context.device)
        run = functools.partial(attend, halo_attention_triton, inputs, case.layout(), case.dtype)
        for tilings in combine_tilings(run):
            title = "; ".join(f"{name} {describe(tiling)}" for name, tiling in tilings.items())
            yield f"{title} | {case}", functools.partial(measure, case, inputs, tilings, context)


def measure(
    case: AttentionCase, inputs: list[Tensor | None], tilings: dict[str, Any], context: Context
) -> dict[str, Any]:
    """Return the MiB that a forward and backward take from the GPU beyond those that PyTorch reserves."""
    context.synchronize()
    before = outside_memory(context)
    with pinned(tilings):
        for _ in range(3):
            attend(halo_attention_triton, inputs, case.layout(), case.dtype)
    context.synchronize()
    grown = (outside_memory(context) - before) / 2**20
    figures: dict[str, Any] = {"worst": round(grown, 1), "limit_mib": LIMIT}
    if grown > LIMIT:
        figures["failed"] = f"{grown:.0f} MiB outside PyTorch's allocator, expected at most {LIMIT}"
    return figures


def outside_memory(context: Context) -> int:
    """Return the bytes in use on the GPU that PyTorch's allocator has not reserved, those of other processes too."""
    if context.dry_run:
        context.replace("torch.cuda.mem_get_info and memory_reserved: 0")
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
