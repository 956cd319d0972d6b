"""CUDA graphs, side streams, and a batch of more than 2**31 elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from halodet.attention.triton_ops import halo_attention_triton
from halodet.benchmark.gpu_check.cases import SMALL, AttentionCase, attend, poisoned_outputs
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context, Skipped
from halodet.benchmark.gpu_check.tilings import pinned, tilings_by_kernel
from halodet.benchmark.gpu_timing import capture

import torch
from torch import Tensor

NORMAL = AttentionCase(8, 3, "bfloat16", False, batch=2, heads=8, height=100, width=168)
# 68 × 2**25 elements per map, 4.25 GiB
IMAGES = 68
LARGE = AttentionCase(8, 3, "bfloat16", False, batch=IMAGES, heads=8, depth=64, value_depth=64, height=256, width=256)
LARGE_BYTES = 64 << 30  # maps, output and gradients


def items(context: Context) -> Items:
    case = SMALL if context.dry_run else NORMAL
    yield "CUDA graph of forward and backward", partial(_run_pinned, check_graph, case, context)
    yield "side stream", partial(_run_pinned, check_stream, case, context)
    large = replace(SMALL, batch=3) if context.dry_run else LARGE
    yield "batch of more than 2**31 elements per map", partial(_run_pinned, check_large_batch, large, context)


def _run_pinned(check: Callable[..., dict[str, Any]], case: AttentionCase, context: Context) -> dict[str, Any]:
    """Run a check with the first tilings: what it checks does not depend on them."""
    part = replace(case, batch=1, height=0, width=0)
    found = tilings_by_kernel(partial(_run, part, part.make_inputs(context.device)))
    with pinned({name: tilings[0] for name, tilings in found.items()}):
        return check(case, context)


def _run(case: AttentionCase, inputs: list[Tensor | None]) -> dict[str, Tensor]:
    return attend(halo_attention_triton, inputs, case.layout(), case.dtype)


def _compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Return the largest difference; results that are not equal in all bits fail."""
    differences = {name: (actual[name] - x).abs().max().item() for name, x in expected.items()}
    unequal = {name: x for name, x in differences.items() if x != 0}  # NaN too
    worst = max((x for x in differences.values() if x == x), default=0.0)
    return {"worst": worst, **({"failed": f"different results: {unequal}"} if unequal else {})}


def check_graph(case: AttentionCase, context: Context) -> dict[str, Any]:
    """Capture after a warm-up, replay on other inputs, and compare with a run without a graph."""
    static, others = (case.make_inputs(context.device, seed) for seed in (0, 1))
    results: dict[str, Tensor] = {}

    def step() -> None:
        results.update(_run(case, static))

    if context.dry_run:
        context.replace("CUDA graph: a plain call")
        replay = step
    else:
        replay = capture(step, context.device).replay
    for x, other in zip(static, others, strict=True):
        if x is not None and other is not None:
            x.copy_(other)
    replay()
    context.synchronize()
    return _compare(results, _run(case, others))


def check_stream(case: AttentionCase, context: Context) -> dict[str, Any]:
    """Run on a stream that is not the current one, on inputs that a slow kernel on it writes last."""
    inputs = case.make_inputs(context.device)
    expected = _run(case, inputs)
    if context.dry_run:
        context.replace("side stream: a plain call")
        return _compare(_run(case, inputs), expected)
    context.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [None if x is None else torch.full_like(x, float("nan")) for x in inputs]
        torch.cuda._sleep(100_000_000)  # cycles; kernels of another stream would read the NaNs
        for x, source in zip(late, inputs, strict=True):
            if x is not None and source is not None:
                x.copy_(source)
        actual = _run(case, late)
    stream.synchronize()
    return _compare(actual, expected)


def check_large_batch(case: AttentionCase, context: Context) -> dict[str, Any]:
    """Compare first and last image of a large batch with the results for each alone."""
    if context.dry_run:
        context.replace("batch of more than 2**31 elements: a batch of 3 small images")
    elif torch.cuda.mem_get_info()[0] < LARGE_BYTES:
        raise Skipped(f"less than {LARGE_BYTES >> 30} GiB of memory are free")
    layout, inputs = case.layout(), case.make_inputs(context.device)
    maps: list[Any] = [x.requires_grad_() for x in inputs[:3] if x is not None]
    rest: tuple[Any, ...] = (*inputs[3:], layout)
    with poisoned_outputs():
        out = halo_attention_triton(*maps, *rest)
        # A map of ones, without its memory
        grads = torch.autograd.grad(out, maps, torch.ones((), dtype=out.dtype, device=out.device).expand_as(out))
    figures: dict[str, Any] = {"elements": maps[0].numel(), "worst": 0.0}
    for index in (0, case.batch - 1):
        image: list[Any] = [x[index : index + 1].detach().requires_grad_() for x in maps]
        alone = halo_attention_triton(*image, *rest)
        expected = dict(zip(("grad_q", "grad_k", "grad_v"), torch.autograd.grad(alone, image, torch.ones_like(alone))))  # noqa: B905
        actual = {name: x[index : index + 1] for name, x in zip(expected, grads, strict=True)}
        found = _compare({"out": out[index : index + 1], **actual}, {"out": alone, **expected})
        figures["worst"] = max(figures["worst"], found["worst"])
        if "failed" in found:
            figures["failed"] = f"image {index}: {found['failed']}"
    return figures
