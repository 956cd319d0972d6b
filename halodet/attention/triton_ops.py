"""Halo attention on a GPU, by the kernels of :mod:`.triton_kernels`, as operators that autograd and ``torch.compile`` know.

Windows and scores never reach memory. What is kept for the backward is the maps, the result and one number per query and head.

The operators launch kernels and nothing else: no copy from or to the host, no waiting, so that CUDA graphs can hold them. The first call
for a kind of block, window, depth and type tries a few tilings; let it, and its backward, run once before a graph is captured.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from halodet.attention.layout import BlockLayout

import torch
from torch import Tensor

MIN_TRITON = (3, 5)  # the first whose loops can be told to hoist nothing
MAX_DEPTH = 128
MAX_ROWS = 256  # of both position tables, as far as they are read
PROGRAMS = 1024  # at most, that share the gradient of the position tables; each leaves a summand of its size


def halo_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    shape: BlockLayout,
) -> Tensor:
    """Halo attention on a GPU; tensors as in :func:`halodet.attention.halo_attention`. It can be differentiated once.

    The result does not change from run to run. Sums are in float32; so are products of float32, unless PyTorch may use TF32 for those.

    Raises:
        ValueError: Triton cannot be used here (:func:`triton_unavailable_reason`) or not for these tensors (:func:`unsupported_reason`).
    """
    if problem := triton_unavailable_reason(q.device) or unsupported_reason(q, v, shape):
        raise ValueError(f"{problem}: use backend='auto'")
    # No query reads the first rows of a table.
    table = torch.cat(
        [x[window - shape.queries :] for x, window in ((rel_h, shape.window_height), (rel_w, shape.window_width))]
    )
    halo = [shape.top, shape.bottom, shape.left, shape.right]
    return _forward(q, k, v, table, extra_k, extra_v, shape.block, halo, shape.stride, shape.mask, shape.scale)[0]


# While compiling, the answer is looked up rather than traced.
@torch.compiler.assume_constant_result
def triton_unavailable_reason(device: torch.device) -> str | None:
    """Why the Triton backend cannot be used on a device, in a sentence, or None.

    Triton is missing or too old, or the device is no GPU or too old a one. The answer is found once. With TRITON_INTERPRET=1 set before
    Triton is imported, its interpreter stands in for a GPU: slow, for tests.
    """
    return _problem(device)


@functools.cache
def _problem(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError:
        return "the Triton backend needs Triton, which is not installed (pip install triton, on Windows triton-windows)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        needed = ".".join(map(str, MIN_TRITON))
        return f"the Triton backend needs Triton {needed} or newer (PyTorch 2.9 brings it) and this is {triton.__version__}"
    if _kernels().INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the Triton backend needs a GPU and the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton backend needs a GPU of compute capability 8.0 or more and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


def unsupported_reason(q: Tensor, v: Tensor, shape: BlockLayout) -> str | None:
    """Why the kernels cannot work on these tensors, in a sentence, or None.

    They know no float64, and their tiles of more than 128 channels, or of windows and blocks of more than 256 positions, would not fit into
    the registers of a GPU.
    """
    if q.dtype == torch.float64:
        return "the Triton backend adds in float32 and takes no float64"
    if max(q.shape[2], v.shape[2]) > MAX_DEPTH:
        return f"the Triton backend takes at most {MAX_DEPTH} channels per head, not {max(q.shape[2], v.shape[2])}"
    if _table_rows(shape) > MAX_ROWS:
        return f"the Triton backend takes at most {MAX_ROWS} rows of both position tables in use, and these windows have {_table_rows(shape)}"
    return None


def _kernels() -> Any:
    """Triton is imported when it is first needed: not every machine has it."""
    return importlib.import_module(".triton_kernels", __package__)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    block: int,
    halo: list[int],
    stride: int,
    mask: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result, and of every query the base-2 logarithm of the sum that its softmax divides by (B, heads, H, W)."""
    kernels, shape = _kernels(), BlockLayout(*k.shape[-2:], block, *halo, stride, mask, scale)
    _check_offsets(q, k, v)
    q, k, v = (_channels_last(x) for x in (q, k, v))
    table, extra_k, extra_v = (None if x is None else x.contiguous() for x in (table, extra_k, extra_v))
    out, lse = _attend_fake(q, k, v)
    with torch.cuda.device_of(q):
        kernels.forward[lambda tile: (_query_tiles(q, shape, tile["BLOCK_M"]),)](
            *(q, k, v, table, extra_k, extra_v, out, lse),
            **_sizes(q, v, shape),
            **_strides(q=q, k=k, v=v),
            **_window(shape),
            **_whole_window(shape, extra_k),
        )
    return out, lse


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_map(q, v.shape[2], q), q.new_empty((*q.shape[:2], *q.shape[3:]), dtype=torch.float32)


def _attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    block: int,
    halo: list[int],
    stride: int,
    mask: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """The gradients of what :func:`_attend` takes; empty tensors for extra keys and values that there are not."""
    kernels, shape = _kernels(), BlockLayout(*k.shape[-2:], block, *halo, stride, mask, scale)
    _check_offsets(grad)
    grad, q, k, v = (_channels_last(x) for x in (grad, q, k, v))
    # As they were made, unless something has moved them since.
    out, lse = out.permute(0, 3, 4, 1, 2).contiguous(), lse.contiguous()
    table, extra_k, extra_v = (None if x is None else x.contiguous() for x in (table, extra_k, extra_v))
    grad_q, grad_k, grad_v, _, grad_extra_k, grad_extra_v = _attend_backward_fake(
        grad, out, lse, q, k, v, table, extra_k, extra_v
    )
    delta = torch.empty_like(lse)
    grad_table = lse.new_zeros(min(PROGRAMS, _query_tiles(q, shape, 16)), *table.shape)
    sizes, window, strides = _sizes(q, v, shape), _window(shape), _strides(q=q, k=k, v=v, grad=grad)
    with torch.cuda.device_of(q):
        kernels.backward_queries[lambda tile: (min(PROGRAMS, _query_tiles(q, shape, tile["BLOCK_M"])),)](
            *(q, k, v, table, extra_k, extra_v, out, lse, grad, delta, grad_q, grad_table),
            **sizes,
            **strides,
            **window,
            **_whole_window(shape, extra_k),
        )
        kernels.backward_keys[
            lambda tile: (k.shape[0] * k.shape[1] * _key_tiles(shape, tile["TILE_H"], tile["TILE_W"]),)
        ](*(q, k, v, table, lse, grad, delta, grad_k, grad_v), **sizes, **strides, **window)
        if extra_k is not None:
            extra, blocks = extra_k.shape[4], extra_k.shape[:4].numel()
            kernels.backward_extra[(blocks * _up(extra, kernels.EXTRA_TILE.value),)](
                *(q, extra_k, extra_v, lse, grad, delta, grad_extra_k, grad_extra_v),
                **sizes,
                **_strides(q=q, grad=grad),
                EXTRA=extra,
            )
    return grad_q, grad_k, grad_v, grad_table.sum(0).to(q.dtype), grad_extra_k, grad_extra_v


def _attend_backward_fake(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    maps = [_empty_map(x, x.shape[2], q) for x in (q, k, v)]
    return *maps, *(q.new_empty(0 if x is None else x.shape) for x in (table, extra_k, extra_v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.halo, ctx.stride, ctx.mask, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    out, lse, *tensors = ctx.saved_tensors
    grads = _backward(grad, out, lse, *tensors, ctx.block, ctx.halo, ctx.stride, ctx.mask, ctx.scale)
    return *(None if x is None else g for g, x in zip(grads, tensors, strict=True)), *(None,) * 5


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("halo attention can be differentiated once; backend='unfolded' gives further derivatives")


_OPTIONS = "int block, int[] halo, int stride, bool mask, float scale"
_MAPS = "Tensor q, Tensor k, Tensor v, Tensor table, Tensor? extra_k, Tensor? extra_v"
_forward = torch.library.custom_op(
    "halodet::halo_attention", _attend, mutates_args=(), schema=f"({_MAPS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
_forward.register_fake(_attend_fake)
_forward.register_autograd(_differentiate, setup_context=_keep)
_backward = torch.library.custom_op(
    "halodet::halo_attention_backward",
    _attend_backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, {_MAPS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 6)})",
)
_backward.register_fake(_attend_backward_fake)
_backward.register_autograd(_refuse)


def _check_offsets(*maps: Tensor) -> None:
    for x in maps:
        if sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
            raise ValueError(
                f"the Triton backend counts the numbers of an image in 32 bits, too few for {tuple(x.shape[1:])}"
            )


def _channels_last(x: Tensor) -> Tensor:
    """A map (B, heads, d, H, W) whose channels lie side by side in memory, copied only if they do not."""
    return x if x.stride(2) == 1 else x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def _empty_map(like: Tensor, depth: int, q: Tensor) -> Tensor:
    """A new map (B, heads, depth, H, W), in memory (B, H, W, heads, depth)."""
    batch, heads, _, height, width = like.shape
    return q.new_empty((batch, height, width, heads, depth)).permute(0, 3, 4, 1, 2)


def _up(count: int, step: int) -> int:
    return -(-count // step)


def _query_tiles(q: Tensor, shape: BlockLayout, size: int) -> int:
    return q.shape[0] * q.shape[1] * shape.rows * shape.columns * _up(shape.queries**2, size)


def _key_tiles(shape: BlockLayout, height: int, width: int) -> int:
    """How many rectangles cover a map where the first begins as far outside it as in ``backward_keys``."""
    return _up(shape.height + -shape.bottom % height, height) * _up(shape.width + -shape.right % width, width)


def _table_rows(shape: BlockLayout) -> int:
    return shape.window_height + shape.window_width + 2 * shape.queries - 2


# What the kernels are told, by the names that they use.


def _strides(**maps: Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}": x.stride(i)
        for name, x in maps.items()
        for axis, i in (("image", 0), ("head", 1), ("y", 3), ("x", 4))
    }


def _sizes(q: Tensor, v: Tensor, shape: BlockLayout) -> dict[str, Any]:
    return {
        "scale": shape.scale,
        "images": q.shape[0],
        "height": shape.height,
        "width": shape.width,
        "query_height": shape.query_height,
        "query_width": shape.query_width,
        "rows": shape.rows,
        "columns": shape.columns,
        "heads": q.shape[1],
        "D_QK": q.shape[2],
        "D_V": v.shape[2],
        "QK_PADDED": _padded(q.shape[2]),
        "V_PADDED": _padded(v.shape[2]),
        "QUERIES": shape.queries,
        "PRECISION": _precision(q.dtype),
    }


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied. Three products of TF32 come close to the rounding of one of float32, for which there is no tensor core."""
    matmul = torch.backends.cuda.matmul
    # Reading the older name of that setting fails where the newer one was used.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    # With half types only the position logits are float32, and TF32 resolves more than the rest does.
    return "tf32x3" if dtype == torch.float32 and not tf32 else "tf32"


def _window(shape: BlockLayout) -> dict[str, int]:
    return {
        "BLOCK": shape.block,
        "TOP": shape.top,
        "LEFT": shape.left,
        "WINDOW_H": shape.window_height,
        "WINDOW_W": shape.window_width,
    }


def _whole_window(shape: BlockLayout, extra_k: Tensor | None) -> dict[str, Any]:
    return {
        "WINDOW_PADDED": _padded(shape.window_height + shape.window_width),
        "SPAN": _padded(_table_rows(shape)),
        "MASK": shape.mask,
        "EXTRA": 0 if extra_k is None else extra_k.shape[4],
    }


def _padded(size: int) -> int:
    """The power of two that Triton works with."""
    return max(16, 1 << (size - 1).bit_length())
