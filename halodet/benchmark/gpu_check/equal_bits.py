"""Repeated runs give equal bits, for every tiling, with many programs and poisoned outputs."""

from __future__ import annotations

import functools
from typing import Any

from halodet.attention.triton_ops import halo_attention_triton
from halodet.benchmark.gpu_check.cases import SMALL, AttentionCase, attend, poisoned_outputs
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context
from halodet.benchmark.gpu_check.tilings import combine_tilings, describe, pinned

import torch
from torch import Tensor

REPETITIONS = 200
TILES = 4096  # smallest number of query tiles
# Feature map of an 800×1333 image at stride 8.
CASES = tuple(
    AttentionCase(8, 3, name, False, batch=2, heads=8, height=100, width=168) for name in ("bfloat16", "float32")
)
_INTEGERS = {2: torch.int16, 4: torch.int32}


def items(context: Context) -> Items:
    repetitions = 3 if context.dry_run else REPETITIONS
    for case in [SMALL] if context.dry_run else CASES:
        inputs = case.make_inputs(context.device)
        run = functools.partial(attend, halo_attention_triton, inputs, case.layout(), case.dtype)
        for chosen in combine_tilings(run):
            title = "; ".join(f"{name} {describe(tiling)}" for name, tiling in chosen.items())
            yield f"{title} | {case}", functools.partial(repeat, case, inputs, chosen, repetitions)


def repeat(case: AttentionCase, inputs: list[Tensor | None], tilings: dict[str, Any], repetitions: int) -> dict:
    """Return the number of runs that differ from the first in any bit of the output or of a gradient."""
    layout = case.layout()
    with poisoned_outputs(), pinned(tilings) as launched:
        first = attend(halo_attention_triton, inputs, layout, case.dtype)
        differing = {name: torch.zeros((), dtype=torch.int64, device=x.device) for name, x in first.items()}
        any_differs = torch.zeros((), dtype=torch.int64, device=first["out"].device)
        for _ in range(repetitions):
            again = attend(halo_attention_triton, inputs, layout, case.dtype)
            changed = {name: (_bits(again[name]) != _bits(x)).any() for name, x in first.items()}
            for name, differs in changed.items():
                differing[name] += differs
            any_differs += torch.stack(list(changed.values())).any()
    runs = int(any_differs)
    blocks = case.batch * case.heads * layout.rows * layout.columns
    figures: dict[str, Any] = {"worst": runs, "repetitions": repetitions, "blocks": blocks}
    if any(launched[name] != repetitions + 1 for name in tilings):
        figures["failed"] = f"launches: {dict(launched)}, expected {repetitions + 1} of each kernel"
    elif not all(x.isfinite().all() for x in first.values()):
        figures["failed"] = "elements are not finite: not written, or overwritten"
    elif runs:
        names = {name: int(count) for name, count in differing.items() if count}
        figures["failed"] = f"{runs} of {repetitions} runs differ: {names}"
    return figures


def _bits(x: Tensor) -> Tensor:
    """View as integers: NaN is equal to itself, and -0 differs from 0."""
    return x.view(_INTEGERS[x.element_size()])
