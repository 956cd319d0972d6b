"""Attention layers against timm's HaloAttn and FlexAttention, with their projections, in bfloat16."""

from __future__ import annotations

from functools import partial
from typing import Any

from halodet.benchmark.attention import MODES, Case, build_call, is_installed, make_cases
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context
from halodet.benchmark.measure import compare

import torch

OTHERS = ("timm", "flex-attention")
ROUNDS = 5


def items(context: Context) -> Items:
    cases = make_cases([(800, 1333)], [8, 16, 32], [1, 8], [(8, 3)])
    if context.dry_run:
        context.replace("bfloat16: float32")
        context.replace("CUDA graph replay: wall time")
        cases = [Case(1, 16, 4, 4, 2, 1, heads=1)]
    # FlexAttention compiles for seconds, so it comes last.
    for name in OTHERS:
        for case in cases:
            for mode in MODES:
                yield f"{name} | {case} {mode}", partial(measure, name, case, mode, context)


def measure(name: str, case: Case, mode: str, context: Context) -> dict[str, Any]:
    """Time halodet and another implementation in turns."""
    names = ["halodet", *([name] if is_installed(name) else [])]
    dtype = torch.float32 if context.dry_run else torch.bfloat16
    results = compare(
        {n: partial(build_call, n, case, mode, "zero", "triton", context.device, dtype) for n in names},
        reference="halodet",
        rounds=1 if context.dry_run else ROUNDS,
        device=context.device,
        warmup=1,
        use_graph=True,
    )
    figures: dict[str, Any] = {"results": results}
    other = results.get(name, {"failed": "not installed"})
    if "failed" in other:
        figures["errors"] = [f"{name}: {other['failed']}"]
    elif name == "timm" and "ratio" in other:
        figures["worst"] = round(1 / other["ratio"], 3)
    if "failed" in results["halodet"]:
        figures["failed"] = results["halodet"]["failed"]
    return figures
