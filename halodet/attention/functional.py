"""The public attention function: checks its arguments and selects a backend."""

from __future__ import annotations

import warnings

from halodet.attention.blocked import halo_attention_blocked
from halodet.attention.layout import BlockLayout
from halodet.attention.reference import halo_attention_reference
from halodet.attention.triton_ops import halo_attention_triton, triton_unavailable_reason, unsupported_reason
from halodet.attention.unfold import halo_attention_unfold
from halodet.utils.exporting import is_exporting

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
SHAPES = {
    "k": ("B", "heads", "d", "H", "W"),
    "rel_h": ("2 * window - 1", "d"),
    "rel_w": ("2 * window - 1", "d"),
    "extra_k": ("B", "heads", "rows", "columns", "E", "d"),
    "extra_v": ("B", "heads", "rows", "columns", "E", "d"),
}


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
    """Compute blocked local self-attention with a halo on feature maps of any height and width.

    The map is partitioned into blocks of ``block_size`` × ``block_size`` pixels. Every query of a block attends to the
    window of that block: the block and the halo around it. The logit of query i and key j is
    ``scale * q·k + q·rel_h[Δy] + q·rel_w[Δx]``, where Δ is table row ``window - 1 + j - i``; i and j are indices within
    block and window, ``window`` is the window size in that direction (``block_size + 2 * halo_size`` with an equal halo
    on all sides).

    Maps may have any memory format; views of channels-last tensors are read without a copy, and the output is one.

    Args:
        q: queries (B, heads, d_qk, ⌈H/stride⌉, ⌈W/stride⌉); with stride 2 those of every second row and column.
        k: keys (B, heads, d_qk, H, W).
        v: values (B, heads, d_v, H, W); d_v may differ from d_qk.
        rel_h: relative position table for the height (2 * window - 1, d_qk), shared by the heads.
        rel_w: relative position table for the width (2 * window - 1, d_qk), shared by the heads.
        block_size: side length of a block in pixels of the full map; a multiple of ``stride``.
        halo_size: halo in pixels, 0 or more, on each side; or a tuple (top, bottom, left, right).
        border: ``"zero"``: keys and values outside the map are zeros that take part in the softmax (as in timm);
            ``"mask"``: they are excluded from it. Padding of the last block counts as outside the map.
        stride: stride of the queries, 1 or 2; blocks and windows stay those of stride 1.
        scale: factor on q·k; ``d_qk ** -0.5`` by default.
        extra_k: additional keys without a position, seen by every query of a block
            (B, heads, ⌈H/block_size⌉, ⌈W/block_size⌉, E, d_qk).
        extra_v: values of the additional keys (B, heads, ⌈H/block_size⌉, ⌈W/block_size⌉, E, d_v).
        backend: a key of :data:`BACKENDS`, or ``"auto"``: ``"triton"`` on a GPU that supports it (otherwise one
            warning), else ``"blocked"``, or ``"unfold"`` under ``torch.compile``. Traced and exported models always
            contain ``"unfold"``.

    Returns:
        Output (B, heads, d_v, ⌈H/stride⌉, ⌈W/stride⌉).

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the expected value.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021.
    """
    halo = _check_sizes(block_size, halo_size, border, stride)
    _check_tensors(k, {"q": q, "k": k, "v": v, "rel_h": rel_h, "rel_w": rel_w, "extra_k": extra_k, "extra_v": extra_v})
    height, width = k.shape[-2:]
    layout = BlockLayout(
        height,
        width,
        block_size,
        *halo,
        stride=stride,
        mask=border == "mask",
        scale=q.shape[2] ** -0.5 if scale is None else float(scale),
    )
    if not torch.jit.is_tracing():
        _check_shapes(q, k, v, rel_h, rel_w, extra_k, extra_v, layout)
    fallback = backend == "auto"
    if fallback:
        backend = _select_backend(q, v, layout)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is invalid: expected 'auto' or one of {sorted(BACKENDS)}")
    # Parameters stay float32 where autocast casts the maps to a half type.
    options = {"fallback": fallback} if backend == "triton" else {}
    return BACKENDS[backend](q, k, v, rel_h.to(q.dtype), rel_w.to(q.dtype), extra_k, extra_v, layout, **options)


def _select_backend(q: Tensor, v: Tensor, layout: BlockLayout) -> str:
    if torch.jit.is_tracing() or is_exporting():
        return "unfold"
    if q.device.type == "cuda":
        reason = triton_unavailable_reason(q.device) or unsupported_reason(q, v, layout)
        if reason is None:
            return "triton"
        _warn_once(f"{reason}; falling back to a slower halo attention backend")
    return "unfold" if torch.compiler.is_compiling() else "blocked"


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
    """Check the sizes and return the halo of each side."""
    if stride not in (1, 2):
        raise ValueError(f"stride={stride} is invalid: expected 1 or 2")
    if block_size < 1 or block_size % stride:
        raise ValueError(f"block_size={block_size} is invalid: expected a positive multiple of stride={stride}")
    halo = (halo_size,) * 4 if isinstance(halo_size, int) else tuple(halo_size)
    if len(halo) != 4 or min(halo) < 0:
        raise ValueError(f"halo_size={halo_size} is invalid: expected an int >= 0 or four (top, bottom, left, right)")
    if border not in BORDERS:
        raise ValueError(f"border={border!r} is invalid: expected one of {BORDERS}")
    return halo


def _check_tensors(k: Tensor, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        expected = SHAPES.get(name, SHAPES["k"])
        if tensor.dim() != len(expected):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {len(expected)}-D ({', '.join(expected)})"
            )
        # Sizes are tensors while tracing; reading one would fix it in the graph.
        if not torch.jit.is_tracing() and 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected a non-empty tensor")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected one of {DTYPES}")
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {k.device}, the device of k")
        if len(expected) != 2 and tensor.dtype != k.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {k.dtype}, the dtype of k")
    if k.dtype == torch.float16 and k.device.type == "cpu":
        raise ValueError("k has dtype torch.float16 on the CPU (sums lose precision), expected bfloat16 or float32")
    if (tensors["extra_k"] is None) != (tensors["extra_v"] is None):
        raise ValueError("extra_k and extra_v must be given together")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    layout: BlockLayout,
) -> None:
    batch, heads, depth = k.shape[:3]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "q": (q, (batch, heads, depth, layout.query_height, layout.query_width)),
        "v": (v, (batch, heads, v.shape[2], layout.height, layout.width)),
        "rel_h": (rel_h, (2 * layout.window_height - 1, depth)),
        "rel_w": (rel_w, (2 * layout.window_width - 1, depth)),
    }
    if extra_k is not None:
        blocks = (batch, heads, layout.rows, layout.columns, extra_k.shape[4])
        expected |= {"extra_k": (extra_k, (*blocks, depth)), "extra_v": (extra_v, (*blocks, v.shape[2]))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            halo = (layout.top, layout.bottom, layout.left, layout.right)
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} for k of shape {tuple(k.shape)}, "
                f"block_size={layout.block}, halo_size={halo} and stride={layout.stride}"
            )
