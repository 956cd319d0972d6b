"""The one public attention function: checks its arguments, picks a backend."""

from __future__ import annotations

import warnings

from halodet.attention.blocked import halo_attention_blocked
from halodet.attention.layout import BlockLayout
from halodet.attention.reference import halo_attention_reference
from halodet.attention.triton_ops import halo_attention_triton, triton_unavailable_reason, unsupported_reason
from halodet.attention.unfold import halo_attention_unfold

import torch
from torch import Tensor

BACKENDS = {
    "triton": halo_attention_triton,
    "blocked": halo_attention_blocked,
    "unfold": halo_attention_unfold,
    "reference": halo_attention_reference,
}
BORDERS = ("zero", "mask")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    block_size: int,
    halo_size: int | tuple[int, int, int, int],
    border: str,
    stride: int = 1,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Blocked local self-attention with a halo, for maps of any height and width.

    The map is cut into blocks of ``block_size`` × ``block_size`` pixels. Every query of a block attends to the whole window of that block:
    the block and the halo around it. The logit of query i and key j is ``scale * q·k + q·rel_h[Δy] + q·rel_w[Δx]``, where Δ is row
    ``window - 1 + j - i`` of the table, i and j counted inside block and window, ``window`` the pixels of the window in that direction
    (``block_size + 2 * halo_size`` where the halo is the same on all sides).

    Maps are read in any memory layout; with the channels last (as views of a channels-last tensor are) none is copied. So is the result.

    Args:
        q: queries (B, heads, d_qk, ⌈H/stride⌉, ⌈W/stride⌉); with stride 2 those of every second row and column.
        k: keys (B, heads, d_qk, H, W).
        v: values (B, heads, d_v, H, W); d_v may differ from d_qk.
        rel_h: relative position table of the height (2 * window - 1, d_qk), shared by the heads.
        rel_w: the same of the width.
        block_size: pixels of the full map along a side of a block; a multiple of ``stride``.
        halo_size: pixels added to a block on each side, 0 or more; or four of them: top, bottom, left, right.
        border: ``"zero"``: keys and values outside the map are zeros that take part in the softmax (timm's semantics);
            ``"mask"``: they are left out of it. What completes the last block counts as outside the map.
        stride: 1 or 2, of the queries; blocks and windows stay those of stride 1.
        scale: factor on q·k, by default ``d_qk ** -0.5``.
        extra_k: keys that every query of a block sees besides its window, without a position
            (B, heads, ⌈H/block_size⌉, ⌈W/block_size⌉, E, d_qk).
        extra_v: their values (B, heads, ⌈H/block_size⌉, ⌈W/block_size⌉, E, d_v).
        backend: a name in :data:`BACKENDS`, or ``"auto"``: on a GPU ``"triton"`` if it can be used, with one warning if not; otherwise
            ``"blocked"``, or ``"unfold"`` while compiling. Traced and exported models always hold ``"unfold"``.

    Returns:
        Tensor (B, heads, d_v, ⌈H/stride⌉, ⌈W/stride⌉).

    Raises:
        ValueError: an argument does not fit; the message says which, what it has and what it needs.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021; table indices as in timm.
    """
    halo = _check_sizes(block_size, halo_size, border, stride)
    _check_tensors({"q": q, "k": k, "v": v, "rel_h": rel_h, "rel_w": rel_w, "extra_k": extra_k, "extra_v": extra_v})
    shape = BlockLayout(
        *k.shape[-2:],
        block_size,
        *halo,
        stride=stride,
        mask=border == "mask",
        scale=q.shape[2] ** -0.5 if scale is None else float(scale),
    )
    if not torch.jit.is_tracing():
        _check_shapes(q, k, v, rel_h, rel_w, extra_k, extra_v, shape)
    if backend == "auto":
        backend = _choose(q, v, shape)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected 'auto' or one of {sorted(BACKENDS)}")
    # Parameters stay float32 where autocast makes the maps half.
    return BACKENDS[backend](q, k, v, rel_h.to(q.dtype), rel_w.to(q.dtype), extra_k, extra_v, shape)


def _choose(q: Tensor, v: Tensor, shape: BlockLayout) -> str:
    if torch.jit.is_tracing() or _exporting():
        return "unfold"
    if q.device.type == "cuda":
        problem = triton_unavailable_reason(q.device) or unsupported_reason(q, v, shape)
        if problem is None:
            return "triton"
        _warn_once(f"{problem}: halo attention uses a slower backend")
    return "unfold" if torch.compiler.is_compiling() else "blocked"


# A constant, because some versions of PyTorch answer yes to all code that they trace.
@torch.compiler.assume_constant_result
def _exporting() -> bool:
    return getattr(torch.compiler, "is_exporting", lambda: False)()


_warned = False


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, stacklevel=2)


def _check_sizes(
    block_size: int, halo_size: int | tuple[int, int, int, int], border: str, stride: int
) -> tuple[int, int, int, int]:
    """The halo of each side."""
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}, expected 1 or 2")
    if block_size < 1 or block_size % stride:
        raise ValueError(f"block_size is {block_size}, expected a positive multiple of the stride, {stride}")
    halo = (halo_size,) * 4 if isinstance(halo_size, int) else tuple(halo_size)
    if len(halo) != 4 or min(halo) < 0:
        raise ValueError(f"halo_size is {halo_size}, expected 0 or more, or four of those: top, bottom, left, right")
    if border not in BORDERS:
        raise ValueError(f"border is {border!r}, expected one of {BORDERS}")
    return halo


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
    k = tensors["k"]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dimensions = {"rel_h": 2, "rel_w": 2, "extra_k": 6, "extra_v": 6}.get(name, 5)
        if tensor.dim() != dimensions:
            kind = {2: "(2 * window - 1, d)", 5: "(B, heads, d, H, W)", 6: "(B, heads, rows, columns, E, d)"}[
                dimensions
            ]
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {dimensions} dimensions {kind}")
        if (
            not torch.jit.is_tracing() and 0 in tensor.shape
        ):  # sizes are tensors there: to ask for one would fix it in the graph
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: there is nothing to attend to in an empty tensor"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype}, expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
            )
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device} but k is on {k.device}: all tensors must be on one device")
        if dimensions != 2 and tensor.dtype != k.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but k is {k.dtype}: queries, keys and values must have one type"
            )
    if k.dtype == torch.float16 and k.device.type == "cpu":
        raise ValueError(
            "k is float16 on the CPU, where sums of that type lose too much: use bfloat16 or float32 there"
        )
    if (tensors["extra_k"] is None) != (tensors["extra_v"] is None):
        raise ValueError("of extra_k and extra_v one is given: extra keys need values, and values keys")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    shape: BlockLayout,
) -> None:
    batch, heads, depth = k.shape[:3]
    expected = {
        "q": (q, (batch, heads, depth, shape.query_height, shape.query_width)),
        "v": (v, (batch, heads, v.shape[2], shape.height, shape.width)),
        "rel_h": (rel_h, (2 * shape.window_height - 1, depth)),
        "rel_w": (rel_w, (2 * shape.window_width - 1, depth)),
    }
    if extra_k is not None:
        blocks = (batch, heads, shape.rows, shape.columns, extra_k.shape[4])
        expected |= {"extra_k": (extra_k, (*blocks, depth)), "extra_v": (extra_v, (*blocks, v.shape[2]))}
    for name, (tensor, wanted) in expected.items():
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {wanted} for k of shape {tuple(k.shape)}, block_size {shape.block}, "
                f"halo (top, bottom, left, right) {(shape.top, shape.bottom, shape.left, shape.right)} and stride {shape.stride}"
            )
