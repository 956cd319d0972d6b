"""The one public attention function: checks its arguments, picks a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocked import halo_attention_blocked
from .reference import halo_attention_reference
from .unfolded import halo_attention_unfolded

BACKENDS = {"blocked": halo_attention_blocked, "unfolded": halo_attention_unfolded, "reference": halo_attention_reference}
BORDERS = ("zero", "mask")


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    block_size: int,
    halo_size: int,
    border: str,
    stride: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Blocked local self-attention with a halo, for maps of any height and width.

    The map is cut into blocks of ``block_size`` × ``block_size`` pixels. Every query of a block attends to the whole window of that block:
    the block and ``halo_size`` pixels around it. The logit of query i and key j is ``scale * q·k + q·rel_h[Δy] + q·rel_w[Δx]``, where Δ is
    row ``window - 1 + j - i`` of the table, i and j counted inside block and window, ``window = block_size + 2 * halo_size``.

    Args:
        q: queries (B, heads, d_qk, ⌈H/stride⌉, ⌈W/stride⌉); with stride 2 those of every second row and column.
        k: keys (B, heads, d_qk, H, W).
        v: values (B, heads, d_v, H, W); d_v may differ from d_qk.
        rel_h: relative position table of the height (2 * window - 1, d_qk), shared by the heads.
        rel_w: the same of the width.
        block_size: pixels of the full map along a side of a block; a multiple of ``stride``.
        halo_size: pixels added to a block on each side, 0 or more.
        border: ``"zero"``: keys and values outside the map are zeros that take part in the softmax (timm's semantics);
            ``"mask"``: they are left out of it. What completes the last block counts as outside the map.
        stride: 1 or 2, of the queries; blocks and windows stay those of stride 1.
        scale: factor on q·k, by default ``d_qk ** -0.5``.
        backend: a name in :data:`BACKENDS`, or ``"auto"``: ``"blocked"``, or ``"unfolded"`` while the model is traced or compiled.

    Returns:
        Tensor (B, heads, d_v, ⌈H/stride⌉, ⌈W/stride⌉).

    Raises:
        ValueError: an argument does not fit; the message says which, what it has and what it needs.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021; table indices as in timm.
    """
    _check(q, k, v, rel_h, rel_w, block_size, halo_size, border, stride)
    if backend == "auto":
        backend = "unfolded" if torch.jit.is_tracing() or torch.compiler.is_compiling() else "blocked"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected 'auto' or one of {sorted(BACKENDS)}")
    return BACKENDS[backend](
        q, k, v, rel_h.to(q.dtype), rel_w.to(q.dtype),  # parameters stay float32 where autocast makes the maps half
        block_size=block_size, halo_size=halo_size, border=border, stride=stride,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
    )  # fmt: skip


def _check(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, block_size: int, halo_size: int, border: str, stride: int
) -> None:
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}, expected 1 or 2")
    if block_size < 1 or block_size % stride:
        raise ValueError(f"block_size is {block_size}, expected a positive multiple of the stride, {stride}")
    if halo_size < 0:
        raise ValueError(f"halo_size is {halo_size}, expected 0 or more")
    if border not in BORDERS:
        raise ValueError(f"border is {border!r}, expected one of {BORDERS}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 5:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected 5 dimensions (B, heads, d, H, W)")
        if 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: there is nothing to attend to in an empty tensor")
    window = block_size + 2 * halo_size
    batch, heads, depth, height, width = k.shape
    expected = {
        "q": (batch, heads, depth, -(-height // stride), -(-width // stride)),
        "v": (batch, heads, v.shape[2], height, width),
        "rel_h": (2 * window - 1, depth),
        "rel_w": (2 * window - 1, depth),
    }
    for name, tensor in (("q", q), ("v", v), ("rel_h", rel_h), ("rel_w", rel_w)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]} for k of shape {tuple(k.shape)}, "
                f"block_size {block_size}, halo_size {halo_size} and stride {stride}"
            )
    for name, tensor in (("q", q), ("k", k), ("v", v), ("rel_h", rel_h), ("rel_w", rel_w)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a floating point type")
        if name in ("q", "v") and tensor.dtype != k.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but k is {k.dtype}: queries, keys and values must have one type")
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device} but k is on {k.device}: all tensors must be on one device")
