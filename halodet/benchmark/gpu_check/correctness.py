"""Every tiling of every kernel against plain PyTorch in float64.

The error of a tensor is compared with that of plain PyTorch in the same dtype: the norm of the error may be at most
``LIMITS`` times as large, and the largest error of an element twice that. Errors below the unit roundoff are equal.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

from halodet.attention.blocked import halo_attention_blocked
from halodet.attention.triton_ops import halo_attention_triton
from halodet.benchmark.gpu_check.cases import (
    TYPES,
    AttentionCase,
    attend,
    correctness_cases,
    matmul_precision,
    poisoned_outputs,
)
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context
from halodet.benchmark.gpu_check.tilings import describe, pinned, tilings_by_kernel

import torch
from torch import Tensor

LIMITS = {"bfloat16": 2.0, "float16": 2.0, "tf32": 2.0, "float32": 4.0}  # tf32x3 is less exact than float32
# Tensors that a kernel computes; an error of another one is that of another kernel.
OWN = {
    "forward": ("out",),
    "backward_queries": ("grad_q", "grad_rel_h", "grad_rel_w"),
    "backward_keys": ("grad_k", "grad_v"),
}
_NOT_FINITE = 1e9  # JSON has no infinity


def items(context: Context) -> Items:
    if context.dry_run:
        context.replace("bfloat16: not run, Triton's interpreter does not multiply it")
        context.replace("TF32: float32, the CPU has no TF32")
    for case in correctness_cases(context.dry_run):
        inputs = case.make_inputs(context.device)
        try:
            with matmul_precision(case.type == "tf32"):
                tilings = tilings_by_kernel(partial(attend, halo_attention_triton, inputs, case.layout(), case.dtype))
        except Exception as error:  # other cases run
            yield f"launches | {case}", partial(_raise, error)
            continue
        first = {name: found[0] for name, found in tilings.items()}
        expected = functools.cache(partial(compute_expected, case, inputs))
        for name in first:
            for tiling in tilings[name]:
                call = partial(check, case, inputs, {**first, name: tiling}, name, expected)
                yield f"{name} {describe(tiling)} | {case}", call


def _raise(error: Exception) -> dict[str, Any]:
    raise error


def compute_expected(case: AttentionCase, inputs: list[Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the results of plain PyTorch in float64 and in the dtype of the case."""
    with matmul_precision(case.type == "tf32"):
        exact = attend(halo_attention_blocked, inputs, case.layout(), torch.float64)
        return exact, attend(halo_attention_blocked, inputs, case.layout(), case.dtype)


def check(case: AttentionCase, inputs: list[Tensor | None], tilings: dict[str, Any], name: str, expected: Any) -> dict:
    """Return the error of each tensor with these tilings, relative to its limit, and the worst of kernel ``name``."""
    with matmul_precision(case.type == "tf32"), poisoned_outputs(), pinned(tilings) as launched:
        actual = attend(halo_attention_triton, inputs, case.layout(), case.dtype)
    missing = [kernel for kernel in tilings if not launched[kernel]]
    if missing:
        return {"failed": f"{missing} did not run: another backend computed the result"}
    exact, plain = expected()
    errors = {key: relative_error(actual[key], plain[key], exact[key], case.type) for key in exact}
    # Tensors of no tiled kernel, such as the extra keys, belong to all.
    others = {key for kernel, keys in OWN.items() if kernel != name for key in keys} if name in OWN else set()
    worst, tensor = max((error, key) for key, error in errors.items() if key not in others)
    figures: dict[str, Any] = {"worst": worst, "limit": LIMITS[case.type], "errors_by_tensor": errors}
    if worst > 1:
        figures["failed"] = f"{tensor}: error {worst:.3g} times the limit"
    return figures


def relative_error(actual: Tensor, plain: Tensor, exact: Tensor, type_name: str) -> float:
    """Return the error relative to its limit; above 1 it is too large."""
    if actual.shape != exact.shape or not actual.isfinite().all():
        return _NOT_FINITE
    roundoff, ratios = TYPES[type_name][1], []
    for order, factor in ((2, 1), (float("inf"), 2)):
        error, of_plain, size = (
            torch.linalg.vector_norm(x.double(), order).item() for x in (actual - exact, plain - exact, exact)
        )
        allowed = LIMITS[type_name] * factor * max(of_plain, roundoff * size)
        ratios.append(error / allowed if allowed else _NOT_FINITE * (error > 0))
    return round(min(max(ratios), _NOT_FINITE), 4)
