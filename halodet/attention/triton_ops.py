"""Halo attention on a GPU: :mod:`.triton_kernels` as custom operators for autograd and ``torch.compile``.

Windows and scores never reach memory; the backward keeps the maps, the output and one number per query and head.

The operators only launch kernels (no host copies, no synchronization), so CUDA graphs can capture them. The first call
for each block size, window, depth and dtype compiles and chooses a tiling: run it and its backward once before
capturing a graph. With ``fallback``, the operators compute in plain PyTorch where the kernels cannot be compiled or
launched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

from halodet.attention.blocked import attend, attend_backward
from halodet.attention.layout import BlockLayout

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TRITON = (3, 5)  # first version with tl.range(disable_licm=True)
MAX_DEPTH = 128
MAX_FLOAT32_DEPTH = 32
MAX_ROWS = 256  # rows read from both position tables
PROGRAMS = 1024  # maximum number of partial sums of the position table gradient
TUNED_TILES = 1024  # tiles of 16 queries from which the tiling is measured; smaller maps take as long as their launch

_failed: dict[tuple[Any, ...], str] = {}  # calls whose kernels cannot be compiled or launched, with the reason
_launched: set[tuple[Any, ...]] = set()


def halo_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    layout: BlockLayout,
    *,
    fallback: bool = False,
) -> Tensor:
    """Compute halo attention on a GPU; tensors as in :func:`halodet.attention.halo_attention`. Differentiable once.

    Deterministic within a process. Under ``torch.use_deterministic_algorithms(True)`` the tiling is fixed by rule
    instead of measured, so that all processes on GPUs of one kind compute the same bits. Accumulates in float32 and
    multiplies float32 as float32, unless PyTorch is allowed to use TF32.

    Args:
        fallback: compute in plain PyTorch, with one warning, if the kernels cannot be compiled or launched.

    Raises:
        ValueError: see :func:`triton_unavailable_reason` and :func:`unsupported_reason`.
        RuntimeError: the kernels cannot be compiled or launched, or the GPU has failed.
    """
    if reason := triton_unavailable_reason(q.device) or unsupported_reason(q, v, layout):
        raise ValueError(f"backend='triton' is not usable: {reason}. Fix: use backend='auto'.")
    # No query reads the first rows of a table.
    table = torch.cat([x[window - layout.queries :] for x, window in _windows(rel_h, rel_w, layout)])
    halo = [layout.top, layout.bottom, layout.left, layout.right]
    options = (layout.block, halo, layout.stride, layout.mask, layout.scale, fallback)
    return _forward(q, k, v, table, extra_k, extra_v, *options)[0]


# torch.compile evaluates this once instead of tracing it.
@torch.compiler.assume_constant_result
def triton_unavailable_reason(device: torch.device) -> str | None:
    """Return why the Triton backend is not usable on a device, or None if it is; the result is cached.

    Triton is missing or too old, or the device is not a GPU or too old. With TRITON_INTERPRET=1 set before Triton is
    imported, the kernels run in Triton's interpreter on the CPU (slow, for tests).
    """
    return _unavailable_reason(device)


@functools.cache
def _unavailable_reason(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install triton; on Windows triton-windows)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        expected = ".".join(map(str, MIN_TRITON))
        return f"Triton {triton.__version__} is too old, expected {expected} or newer (included in PyTorch 2.9)"
    try:
        if _kernels().INTERPRETED:
            return None
    except Exception as error:  # Triton's decorators raise nearly anything on a broken installation
        return f"Triton cannot be used ({_one_line(error)})"
    if torch.version.hip is not None:
        return "the kernels support NVIDIA GPUs only, not AMD's (ROCm)"
    if device.type != "cuda":
        return f"Triton needs a GPU, but the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, expected 8.0 or higher"
    return None


def unsupported_reason(q: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Return why the Triton kernels do not support these tensors, or None if they do.

    float64 is not supported, and tiles of more than 128 channels or 256 table rows would not fit into registers. Nor
    would float32 at more than 32 channels, unless PyTorch is allowed to use TF32: three products replace each one.
    """
    if q.dtype == torch.float64:
        return "the Triton backend does not support float64"
    depth = max(q.shape[2], v.shape[2])
    if depth > MAX_DEPTH:
        return f"the Triton backend supports at most {MAX_DEPTH} channels per head, got {depth}"
    if _table_rows(layout) > MAX_ROWS:
        return f"the Triton backend supports at most {MAX_ROWS} position table rows, got {_table_rows(layout)}"
    if q.dtype == torch.float32 and depth > MAX_FLOAT32_DEPTH and _precision(q.dtype) != "tf32":
        return (
            f"the Triton backend supports at most {MAX_FLOAT32_DEPTH} channels per head in float32 without TF32, got "
            f"{depth}"
        )
    return None


def _kernels() -> Any:
    """Import the kernels on first use: Triton is optional."""
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
    fallback: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and the base-2 log-sum-exp of every query (B, heads, H, W)."""
    layout = BlockLayout(*k.shape[-2:], block, *halo, stride, mask, scale)
    _check_offsets(q, k, v)
    out, lse = _attend_fake(q, k, v)
    kind = _kind(q, v, layout, extra_k)
    with _plain_if_impossible(kind, fallback) as possible:
        if possible:
            _launch_forward(*(_channels_last(x) for x in (q, k, v)), table, extra_k, extra_v, layout, out, lse)
    if kind in _failed:
        out.copy_(attend(q, k, v, *_tables(table, layout), extra_k, extra_v, layout))
        lse.fill_(torch.nan)  # of no use to the kernels of the backward, if they run after all
    return out, lse


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    layout: BlockLayout,
    out: Tensor,
    lse: Tensor,
) -> None:
    kernels = _kernels()
    table, extra_k, extra_v = (None if x is None else x.contiguous() for x in (table, extra_k, extra_v))
    with torch.cuda.device_of(q):
        kernels.forward[lambda tile: (_query_tiles(q, layout, tile["BLOCK_M"]),)](
            *(q, k, v, table, extra_k, extra_v, out, lse),
            **_sizes(q, v, layout),
            **_strides(q=q, k=k, v=v),
            **_window(layout),
            **_whole_window(layout, extra_k),
            TUNED=_is_tuned(q, layout),
        )


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
    fallback: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of the tensors that :func:`_attend` takes; empty ones for absent extra keys and values."""
    layout = BlockLayout(*k.shape[-2:], block, *halo, stride, mask, scale)
    _check_offsets(grad)
    forward = _kind(q, v, layout, extra_k)
    kind = ("backward", *forward)
    if forward in _failed:  # there is no log-sum-exp
        _failed[kind] = _failed[forward]
    grads: tuple[Tensor, ...] = ()
    with _plain_if_impossible(kind, fallback) as possible:
        if possible:
            grads = _launch_backward(grad, out, lse, q, k, v, table, extra_k, extra_v, layout)
    if kind not in _failed:
        return grads
    *maps, grad_h, grad_w, grad_extra_k, grad_extra_v = attend_backward(
        grad, q, k, v, *_tables(table, layout), extra_k, extra_v, layout
    )
    copies = _attend_backward_fake(grad, out, lse, q, k, v, table, extra_k, extra_v)
    rows = torch.cat([x[-_rows(window, layout) :] for x, window in _windows(grad_h, grad_w, layout)])
    for copy, x in zip(copies, (*maps, rows, grad_extra_k, grad_extra_v), strict=True):
        if x is not None:
            copy.copy_(x)
    return copies


def _launch_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    layout: BlockLayout,
) -> tuple[Tensor, ...]:
    kernels = _kernels()
    grad, q, k, v = (_channels_last(x) for x in (grad, q, k, v))
    # A no-op unless the memory format was changed since the forward.
    out, lse = out.permute(0, 3, 4, 1, 2).contiguous(), lse.contiguous()
    table, extra_k, extra_v = (None if x is None else x.contiguous() for x in (table, extra_k, extra_v))
    grad_q, grad_k, grad_v, _, grad_extra_k, grad_extra_v = _attend_backward_fake(
        grad, out, lse, q, k, v, table, extra_k, extra_v
    )
    delta = torch.empty_like(lse)
    grad_table = lse.new_empty(min(PROGRAMS, _query_tiles(q, layout, 16)), *table.shape)
    sizes, window, strides = _sizes(q, v, layout), _window(layout), _strides(q=q, k=k, v=v, grad=grad)
    tuned, programs = _is_tuned(q, layout), 0

    def query_grid(tile: dict[str, int]) -> tuple[int]:
        nonlocal programs
        programs = min(PROGRAMS, _query_tiles(q, layout, tile["BLOCK_M"]))
        return (programs,)

    with torch.cuda.device_of(q):
        kernels.backward_queries[query_grid](
            *(q, k, v, table, extra_k, extra_v, out, lse, grad, delta, grad_q, grad_table),
            **sizes,
            **strides,
            **window,
            **_whole_window(layout, extra_k),
            TUNED=tuned,
        )
        kernels.backward_keys[
            lambda tile: (k.shape[0] * k.shape[1] * _key_tiles(layout, tile["TILE_H"], tile["TILE_W"]),)
        ](*(q, k, v, table, lse, grad, delta, grad_k, grad_v), **sizes, **strides, **window, TUNED=tuned)
        if extra_k is not None:
            extra, blocks = extra_k.shape[4], extra_k.shape[:4].numel()
            kernels.backward_extra[(blocks * _ceil_div(extra, kernels.EXTRA_TILE.value),)](
                *(q, extra_k, extra_v, lse, grad, delta, grad_extra_k, grad_extra_v),
                **sizes,
                **_strides(q=q, grad=grad),
                EXTRA=extra,
            )
    return grad_q, grad_k, grad_v, grad_table[:programs].sum(0).to(q.dtype), grad_extra_k, grad_extra_v


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


def _kind(q: Tensor, v: Tensor, layout: BlockLayout, extra_k: Tensor | None) -> tuple[Any, ...]:
    """Return what the compiled kernels of a call depend on."""
    depths = q.shape[2], v.shape[2], _precision(q.dtype), 0 if extra_k is None else extra_k.shape[4]
    window = layout.window_height, layout.window_width, layout.queries, layout.mask, _is_tuned(q, layout)
    return q.device, q.dtype, *depths, layout.block, *window


def _is_tuned(q: Tensor, layout: BlockLayout) -> bool:
    """Return whether the tiling is measured: not by rule, and the map is large enough to measure."""
    return not torch.are_deterministic_algorithms_enabled() and _query_tiles(q, layout, 16) >= TUNED_TILES


@contextlib.contextmanager
def _plain_if_impossible(kind: tuple[Any, ...], fallback: bool) -> Iterator[bool]:
    """Run kernels; if they cannot be compiled or launched, add ``kind`` to ``_failed`` with one warning.

    Yields whether to run them: with ``fallback``, not again if they have failed before.

    Raises:
        RuntimeError: without ``fallback``, or the GPU itself has failed, or a CUDA graph is captured too early.
    """
    device = next(part for part in kind if isinstance(part, torch.device))
    if kind in _failed and fallback:
        yield False
        return
    _failed.pop(kind, None)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing and kind not in _launched:
        raise RuntimeError(
            "halo attention is captured in a CUDA graph before its kernels are compiled. Fix: run its forward and "
            "backward once, on maps of the same size, before the capture."
        )
    try:
        yield True
        _launched.add(kind)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compiler and driver raise nearly anything
        reason = _one_line(error)
        if device.type == "cuda" and not capturing:
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as lost:
                raise RuntimeError(
                    f"{device} has failed ({_one_line(lost)}) in the Triton kernels of halo attention ({reason}). Fix: "
                    "restart the process; set backend='blocked' if it happens again."
                ) from error
        if not fallback or capturing:
            raise RuntimeError(
                f"backend='triton' is not usable: its kernels cannot be compiled or launched on {device} ({reason}). "
                "Fix: use backend='auto' or 'blocked'."
            ) from error
        if reason not in _failed.values():
            warnings.warn(f"{reason}; falling back to a slower halo attention backend", stacklevel=2)
        _failed[kind] = reason


def _tables(table: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Return the two position tables, with zeros for the first rows, which no query reads."""
    parts = table.split([_rows(window, layout) for window in (layout.window_height, layout.window_width)])
    return tuple(F.pad(x, (0, 0, window - layout.queries, 0)) for x, window in _windows(*parts, layout))


def _windows(rel_h: Tensor, rel_w: Tensor, layout: BlockLayout) -> tuple[tuple[Tensor, int], ...]:
    return (rel_h, layout.window_height), (rel_w, layout.window_width)


def _rows(window: int, layout: BlockLayout) -> int:
    """Return the number of rows of a position table that the queries read."""
    return window + layout.queries - 1


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block, ctx.halo, ctx.stride, ctx.mask, ctx.scale, ctx.fallback = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    out, lse, *tensors = ctx.saved_tensors
    options = (ctx.block, ctx.halo, ctx.stride, ctx.mask, ctx.scale, ctx.fallback)
    grads = _backward(grad, out, lse, *tensors, *options)
    return *(None if x is None else g for g, x in zip(grads, tensors, strict=True)), *(None,) * 6


def _raise_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("double backward is not supported by backend='triton'. Fix: use backend='unfold'.")


_OPTIONS = "int block, int[] halo, int stride, bool mask, float scale, bool fallback"
_MAPS = "Tensor q, Tensor k, Tensor v, Tensor table, Tensor? extra_k, Tensor? extra_v"
_forward = torch.library.custom_op(
    "halodet::halo_attention", _attend, mutates_args=(), schema=f"({_MAPS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
_forward.register_fake(_attend_fake)
_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward = torch.library.custom_op(
    "halodet::halo_attention_backward",
    _attend_backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, {_MAPS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 6)})",
)
_backward.register_fake(_attend_backward_fake)
_backward.register_autograd(_raise_double_backward)


def _check_offsets(*maps: Tensor) -> None:
    for x in maps:
        if sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
            raise ValueError(
                f"map of shape {tuple(x.shape)} is too large for the Triton backend: expected less than 2**31 elements "
                "per image. Fix: use backend='blocked'."
            )


def _channels_last(x: Tensor) -> Tensor:
    """Return a map (B, heads, d, H, W) whose channels are contiguous in memory, copied only if necessary."""
    return x if x.stride(2) == 1 else x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def _empty_map(like: Tensor, depth: int, q: Tensor) -> Tensor:
    """Allocate a map (B, heads, depth, H, W), laid out in memory as (B, H, W, heads, depth)."""
    batch, heads, _, height, width = like.shape
    return q.new_empty((batch, height, width, heads, depth)).permute(0, 3, 4, 1, 2)


def _ceil_div(count: int, step: int) -> int:
    return -(-count // step)


def _query_tiles(q: Tensor, layout: BlockLayout, size: int) -> int:
    return q.shape[0] * q.shape[1] * layout.rows * layout.columns * _ceil_div(layout.queries**2, size)


def _key_tiles(layout: BlockLayout, height: int, width: int) -> int:
    """Return the number of tiles that cover a map; the first starts outside it, as in ``backward_keys``."""
    return _ceil_div(layout.height + -layout.bottom % height, height) * _ceil_div(
        layout.width + -layout.right % width, width
    )


def _table_rows(layout: BlockLayout) -> int:
    return layout.window_height + layout.window_width + 2 * layout.queries - 2


def _strides(**maps: Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}": x.stride(i)
        for name, x in maps.items()
        for axis, i in (("image", 0), ("head", 1), ("y", 3), ("x", 4))
    }


def _sizes(q: Tensor, v: Tensor, layout: BlockLayout) -> dict[str, Any]:
    return {
        "scale": layout.scale,
        "images": q.shape[0],
        "height": layout.height,
        "width": layout.width,
        "query_height": layout.query_height,
        "query_width": layout.query_width,
        "rows": layout.rows,
        "columns": layout.columns,
        "heads": q.shape[1],
        "D_QK": q.shape[2],
        "D_V": v.shape[2],
        "QK_PADDED": _padded(q.shape[2]),
        "V_PADDED": _padded(v.shape[2]),
        "QUERIES": layout.queries,
        "PRECISION": _precision(q.dtype),
    }


def _precision(dtype: torch.dtype) -> str:
    """Return the dot precision. Three TF32 products approximate a float32 product, which tensor cores do not have."""
    matmul = torch.backends.cuda.matmul
    # Reading the old setting raises where the new one was set.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    # With half types only the position logits are float32, and TF32 is more precise than the rest.
    return "tf32x3" if dtype == torch.float32 and not tf32 else "tf32"


def _window(layout: BlockLayout) -> dict[str, int]:
    return {
        "BLOCK": layout.block,
        "TOP": layout.top,
        "LEFT": layout.left,
        "WINDOW_H": layout.window_height,
        "WINDOW_W": layout.window_width,
    }


def _whole_window(layout: BlockLayout, extra_k: Tensor | None) -> dict[str, Any]:
    return {
        "WINDOW_PADDED": _padded(layout.window_height + layout.window_width),
        "SPAN": _padded(_table_rows(layout)),
        "MASK": layout.mask,
        "EXTRA": 0 if extra_k is None else extra_k.shape[4],
    }


def _padded(size: int) -> int:
    """Round up to a power of two of at least 16, as ``tl.dot`` requires."""
    return max(16, 1 << (size - 1).bit_length())
