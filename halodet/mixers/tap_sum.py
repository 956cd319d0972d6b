"""Weighted sums over the neighborhood of each pixel, with weights per head and pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halodet.utils.exporting import is_exporting

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 20  # of the output, per chunk of rows on a CPU; fastest where chunks fit in the cache


def sum_taps(weights: Tensor, values: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """Sum the values of k x k pixels around each pixel, one of these taps at a time.

    Unfolding the values would take as many times their memory as there are taps. Differentiable once.

    Args:
        weights: weights of the taps (B, heads, k * k, H, W).
        values: values (B, heads, d, H, W), or (B, 1, d, H, W) for values that all heads share.
        kernel_size: k, odd.
        dilation: distance of the taps.

    Returns:
        Sums (B, heads, d, H, W), with zeros for values outside the map. They are added up in at least float32.
    """
    weights, padded = weights.to(values.dtype), F.pad(values.contiguous(), (dilation * (kernel_size // 2),) * 4)
    if torch.jit.is_tracing() or is_exporting() or torch.compiler.is_compiling():
        return _sum_taps(weights, padded, kernel_size, dilation)
    return _TapSum.apply(weights, padded, kernel_size, dilation)


class _TapSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, padded: Tensor, kernel_size: int, dilation: int) -> Tensor:
        ctx.save_for_backward(weights, padded)
        ctx.sizes = kernel_size, dilation
        rows = _rows_per_chunk(weights, padded)
        chunks = _chunks(weights, padded, rows, kernel_size, dilation)
        return torch.cat([_sum_taps(w, p, kernel_size, dilation) for w, p in chunks], 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights, padded), (kernel_size, dilation) = ctx.saved_tensors, ctx.sizes
        grad_weights = torch.empty_like(weights)
        grad_padded = torch.zeros_like(padded, dtype=torch.promote_types(padded.dtype, torch.float32))
        rows, shared = _rows_per_chunk(weights, padded), padded.shape[1] < weights.shape[1]
        parts = zip(
            grad.split(rows, 3),
            grad_weights.split(rows, 3),
            _chunks(weights, padded, rows, kernel_size, dilation),
            _chunks(weights, grad_padded, rows, kernel_size, dilation),
            strict=True,
        )
        for part, grad_w, (w, p), (_, grad_p) in parts:
            part = part.contiguous()
            for tap in range(kernel_size**2):
                window, grad_window = (_window(x, tap, kernel_size, dilation, *part.shape[3:]) for x in (p, grad_p))
                torch.sum(part * window, 2, out=grad_w[:, :, tap])
                weight = w[:, :, tap].unsqueeze(2)
                if shared:
                    grad_window += (weight * part).sum(1, keepdim=True)
                else:
                    grad_window.addcmul_(weight, part)
        return grad_weights, grad_padded.to(padded.dtype), None, None


def _sum_taps(weights: Tensor, padded: Tensor, kernel_size: int, dilation: int) -> Tensor:
    height, width = weights.shape[3:]
    first = _window(padded, 0, kernel_size, dilation, height, width)
    out = (weights[:, :, 0].unsqueeze(2) * first).to(torch.promote_types(padded.dtype, torch.float32))
    for tap in range(1, kernel_size**2):
        window = _window(padded, tap, kernel_size, dilation, height, width)
        out = out.addcmul_(weights[:, :, tap].unsqueeze(2), window)
    return out.to(padded.dtype)


def _window(padded: Tensor, tap: int, kernel_size: int, dilation: int, height: int, width: int) -> Tensor:
    """View the pixels of a tap in a padded map."""
    top, left = dilation * (tap // kernel_size), dilation * (tap % kernel_size)
    return padded.narrow(3, top, height).narrow(4, left, width)


def _rows_per_chunk(weights: Tensor, padded: Tensor) -> int:
    batch, heads, _, height, width = weights.shape
    if weights.device.type != "cpu":
        return height
    return max(1, CHUNK_BYTES // (batch * heads * padded.shape[2] * width * padded.element_size()))


def _chunks(
    weights: Tensor, padded: Tensor, rows: int, kernel_size: int, dilation: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split weights, and the rows of a padded map that they need."""
    for top in range(0, weights.shape[3], rows):
        part = weights[..., top : top + rows, :]
        yield part, padded[..., top : top + part.shape[3] + dilation * (kernel_size - 1), :]
