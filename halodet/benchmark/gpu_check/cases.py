"""Attention cases that the steps run, and their output and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from halodet.attention.layout import BlockLayout

import torch
from torch import Tensor

# Type -> (torch dtype, unit roundoff of a product)
TYPES = {
    "bfloat16": (torch.bfloat16, 2.0**-8),
    "float32": (torch.float32, 2.0**-23),
    "tf32": (torch.float32, 2.0**-11),
    "float16": (torch.float16, 2.0**-11),
}
BLOCKS = ((8, 3), (14, 2), (7, 3), (32, 3), (2, 1), (1, 1))  # block and halo size
INPUTS = ("q", "k", "v", "rel_h", "rel_w", "extra_k", "extra_v")


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and type of one call of halo attention."""

    block: int
    halo: int
    type: str
    mask: bool = True
    stride: int = 1
    extra: int = 0
    batch: int = 2
    heads: int = 2
    depth: int = 16
    value_depth: int = 16
    height: int = 0  # 0: ragged, see size()
    width: int = 0

    def __str__(self) -> str:
        parts = [f"b{self.block} h{self.halo} {self.type} {'mask' if self.mask else 'zero'}"]
        parts += [f"stride {self.stride}"] * (self.stride > 1) + [f"extra {self.extra}"] * (self.extra > 0)
        height, width = self.size()
        return " ".join([*parts, f"{self.batch}×{self.heads}×({self.depth},{self.value_depth})×{height}×{width}"])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors."""
        return TYPES[self.type][0]

    def size(self) -> tuple[int, int]:
        """Return height and width of the map; by default neither is a multiple of the block size."""
        ragged = (2 * self.block + max(self.block - 3, 1), 3 * self.block + max(self.block // 2, 1))
        return self.height or ragged[0], self.width or ragged[1]

    def layout(self) -> BlockLayout:
        """Return the layout of the blocks."""
        scale = self.depth**-0.5
        return BlockLayout(*self.size(), self.block, *(self.halo,) * 4, stride=self.stride, mask=self.mask, scale=scale)

    def make_inputs(self, device: torch.device, seed: int = 0) -> list[Tensor | None]:
        """Return random arguments of a backend in the dtype of the case; normal tables, as the logits are."""
        layout, generator = self.layout(), torch.Generator(device).manual_seed(seed)
        maps, blocks = (self.batch, self.heads), (layout.rows, layout.columns, self.extra)
        sizes = [
            (*maps, self.depth, layout.query_height, layout.query_width),
            (*maps, self.depth, layout.height, layout.width),
            (*maps, self.value_depth, layout.height, layout.width),
            (2 * layout.window_height - 1, self.depth),
            (2 * layout.window_width - 1, self.depth),
            (*maps, *blocks, self.depth) if self.extra else None,
            (*maps, *blocks, self.value_depth) if self.extra else None,
        ]
        return [
            None if size is None else torch.randn(size, generator=generator, device=device, dtype=self.dtype)
            for size in sizes
        ]


# For dry runs
SMALL = AttentionCase(2, 1, "float32", depth=4, heads=1, batch=1, height=3, width=3)


def attend(
    backend: Callable[..., Tensor], inputs: list[Tensor | None], layout: BlockLayout, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the output and all gradients of a backend, computed in ``dtype``."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    out = backend(*leaves, layout)
    rounded = next(x.dtype for x in inputs if x is not None)
    # Fixed weights whose sum over a window does not vanish, equal in all dtypes.
    weight = torch.arange(out.numel(), device=out.device).view(out.shape).mul(0.7).cos()
    named = {name: x for name, x in zip(INPUTS, leaves, strict=True) if x is not None}
    grads = torch.autograd.grad(out, list(named.values()), weight.to(rounded).to(dtype))
    return {"out": out.detach(), **{f"grad_{name}": grad for name, grad in zip(named, grads, strict=True)}}


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 products of float32 matrices."""
    matmul = torch.backends.cuda.matmul
    name, values = ("fp32_precision", ("ieee", "tf32")) if hasattr(matmul, "fp32_precision") else ("allow_tf32", (0, 1))
    before = getattr(matmul, name)
    setattr(matmul, name, values[tf32])
    try:
        yield
    finally:
        setattr(matmul, name, before)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill newly allocated tensors with NaN: elements that a kernel does not write show."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def correctness_cases(dry_run: bool) -> list[AttentionCase]:
    """Return cases that cover all block sizes with all types, and the options with some of them, first things first."""
    if dry_run:  # the interpreter does not multiply bfloat16
        small = [AttentionCase(block, 1, "float32", block > 1, depth=4, heads=1, batch=1) for block in (2, 1)]
        return [
            *small,
            AttentionCase(2, 1, "tf32", depth=4, heads=1, batch=1),
            AttentionCase(2, 1, "float16", False, stride=2, extra=2, depth=4, value_depth=5, batch=1),
        ]
    cases = []
    for i, name in enumerate(TYPES):
        for j, (block, halo) in enumerate(BLOCKS):
            depths = (16, 32) if (i + j) % 3 else (24, 20)  # also padded ones
            cases.append(AttentionCase(block, halo, name, bool((i + j) % 2), depth=depths[0], value_depth=depths[1]))
        cases += {
            "bfloat16": [  # those that kernel_timing and layer_timing run
                *(AttentionCase(8, 3, name, False, depth=d, value_depth=d) for d in (16, 32, 64)),
                AttentionCase(8, 3, name, False, stride=2, extra=5),
                AttentionCase(8, 3, name, True, batch=1, heads=1),
            ],
            "float32": [
                AttentionCase(8, 3, name, False),  # that of equal_bits
                AttentionCase(8, 3, name, True, extra=18),
                AttentionCase(14, 2, name, False, stride=2),
            ],
            "tf32": [AttentionCase(2, 1, name, False, stride=2, extra=2, batch=1, heads=1)],
            "float16": [AttentionCase(32, 3, name, True, stride=2)],
        }[name]
    return cases
