"""Halo attention in plain PyTorch, a few rows of blocks at a time, for any device and size.

Only one chunk of windows and scores exists at once, small enough to stay in a processor's cache; the backward keeps the maps alone and
computes the scores anew.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 8 << 20}  # of scores held at once; what stays in cache is computed fastest
CHUNK_BYTES_ELSEWHERE = 256 << 20  # a GPU wants more work in each launch


class _Shape(NamedTuple):
    """Sizes of one call; a block has ``block`` pixels and ``queries`` queries along a side."""

    block: int
    halo: int
    window: int
    queries: int
    rows: int  # of blocks
    columns: int  # of blocks
    height: int
    width: int
    mask: bool
    scale: float


def halo_attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    block_size: int,
    halo_size: int,
    border: str,
    stride: int,
    scale: float,
) -> Tensor:
    """Halo attention in chunks; arguments and result as :func:`halodet.attention.halo_attention`. It can be differentiated once."""
    height, width = k.shape[-2:]
    shape = _Shape(
        block=block_size,
        halo=halo_size,
        window=block_size + 2 * halo_size,
        queries=block_size // stride,
        rows=-(-height // block_size),
        columns=-(-width // block_size),
        height=height,
        width=width,
        mask=border == "mask",
        scale=scale,
    )
    return _HaloAttention.apply(q, k, v, rel_h, rel_w, shape)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The arguments have one type by now, which the buffers share; some devices (meta) know no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _HaloAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, shape: _Shape) -> Tensor:
        with _without_autocast(q.device):
            chunks = _Chunks(q, k, v, rel_h, rel_w, shape)
            out = v.new_empty(*q.shape[:2], v.shape[2], shape.rows * shape.queries, shape.columns * shape.queries)
            blocks = _blocks(out, shape)
            for image, first, last in chunks:
                weights = chunks.weights(image, first, last)
                values = chunks.window(chunks.v, image, first, last)
                mixed = torch.bmm(weights, values.transpose(1, 2))
                blocks[image, :, first:last].copy_(mixed.view(blocks[image, :, first:last].shape))
        ctx.save_for_backward(q, k, v, rel_h, rel_w)
        ctx.shape = shape
        return out[..., : q.shape[-2], : q.shape[-1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rel_h, rel_w = ctx.saved_tensors
        shape: _Shape = ctx.shape
        with _without_autocast(q.device):
            chunks = _Chunks(q, k, v, rel_h, rel_w, shape)
            grad = _pad_queries(grad.to(q.dtype), shape)
            grad_blocks = _blocks(grad, shape)
            grad_q = torch.empty_like(chunks.q)
            grad_q_blocks = _blocks(grad_q, shape)
            grad_k, grad_v = torch.zeros_like(chunks.k), torch.zeros_like(chunks.v)
            grad_h, grad_w = torch.zeros_like(chunks.table_h), torch.zeros_like(chunks.table_w)
            for image, first, last in chunks:
                weights = chunks.weights(image, first, last)
                keys = chunks.window(chunks.k, image, first, last)
                values = chunks.window(chunks.v, image, first, last)
                grad_out = grad_blocks[image, :, first:last].flatten(0, 2).flatten(1, 2)
                chunks.add_windows(grad_v, image, first, last, torch.bmm(grad_out.transpose(1, 2), weights))
                grad_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad_out, values), weights, -1, weights.dtype)
                queries = chunks.queries(image, first, last)
                flat = queries.flatten(3, 4).flatten(0, 2)
                chunks.add_windows(grad_k, image, first, last, torch.bmm(flat.transpose(1, 2), grad_scores).mul_(shape.scale))

                # Of the scores, positions see the sums over the other direction.
                both = grad_scores.view(*queries.shape[:-1], shape.window, shape.window)
                along_h = _by_row(both.sum(-1))
                along_w = _by_column(both.sum(-2))
                grad_h += torch.bmm(along_h.transpose(1, 2), _by_row(queries))
                grad_w += torch.bmm(along_w.transpose(1, 2), _by_column(queries))
                grad_queries = torch.bmm(grad_scores, keys.transpose(1, 2)).mul_(shape.scale).view(queries.shape)
                grad_queries += _from_row(torch.bmm(along_h, chunks.table_h), queries)
                grad_queries += _from_column(torch.bmm(along_w, chunks.table_w), queries)
                grad_q_blocks[image, :, first:last].copy_(grad_queries)
            grad_rel = []
            for table, grad_table in ((rel_h, grad_h), (rel_w, grad_w)):
                grad_rel.append(torch.zeros_like(table).index_add_(0, chunks.table_rows.flatten(), grad_table.flatten(0, 1)))
        inside = (..., slice(shape.halo, shape.halo + shape.height), slice(shape.halo, shape.halo + shape.width))
        return grad_q[..., : q.shape[-2], : q.shape[-1]], grad_k[inside], grad_v[inside], *grad_rel, None


class _Chunks:
    """The padded maps of one call, and what is computed from a chunk of them: (image, first, last row of blocks)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, shape: _Shape) -> None:
        self.shape = shape
        self.q = _pad_queries(q, shape)
        right = shape.columns * shape.block - shape.width + shape.halo
        bottom = shape.rows * shape.block - shape.height + shape.halo
        self.k, self.v = (F.pad(x, (shape.halo, right, shape.halo, bottom)).contiguous() for x in (k, v))
        i = torch.arange(shape.queries, device=q.device)
        self.table_rows = shape.window - 1 + torch.arange(shape.window, device=q.device) - i.unsqueeze(1)  # (queries, window)
        self.table_h, self.table_w = rel_h[self.table_rows], rel_w[self.table_rows]  # (queries, window, d)

    def __iter__(self):
        shape, (batch, heads) = self.shape, self.q.shape[:2]
        row_bytes = heads * shape.columns * (shape.queries * shape.window) ** 2 * self.q.element_size()
        budget = CHUNK_BYTES.get(self.q.device.type, CHUNK_BYTES_ELSEWHERE)
        chunks = -(-shape.rows // max(1, min(shape.rows, budget // row_bytes)))
        step = -(-shape.rows // chunks)  # chunks of even size
        for image in range(batch):
            for first in range(0, shape.rows, step):
                yield image, first, min(first + step, shape.rows)

    def queries(self, image: int, first: int, last: int) -> Tensor:
        """(heads, rows, columns, queries, queries, d), contiguous."""
        return _blocks(self.q, self.shape)[image, :, first:last].contiguous()

    def window(self, x: Tensor, image: int, first: int, last: int) -> Tensor:
        """The windows of a padded map: (heads * rows * columns, d, window * window)."""
        shape = self.shape
        view = x[image].unfold(-2, shape.window, shape.block).unfold(-2, shape.window, shape.block)
        view = view[:, :, first:last].permute(0, 2, 3, 1, 4, 5)
        return view.reshape(-1, x.shape[2], shape.window**2)

    def add_windows(self, x: Tensor, image: int, first: int, last: int, windows: Tensor) -> None:
        """Add windows to the padded map ``x`` they were taken from.

        Windows overlap, but parts of them as wide as a block do not: each part of all of a row's windows is added at once.
        """
        shape = self.shape
        windows = windows.view(x.shape[1], last - first, shape.columns, x.shape[2], shape.window, shape.window)
        for row in range(first, last):
            slab = x[image, :, :, row * shape.block : row * shape.block + shape.window]
            for part in range(0, shape.window, shape.block):
                size = min(shape.block, shape.window - part)
                columns = slab[..., part:].unfold(-1, size, shape.block)[..., : shape.columns, :]
                columns += windows[:, row - first, ..., part : part + size].permute(0, 2, 3, 1, 4)

    def weights(self, image: int, first: int, last: int) -> Tensor:
        """Attention weights (heads * rows * columns, queries * queries, window * window)."""
        shape = self.shape
        queries = self.queries(image, first, last)
        along_h = _from_row(torch.bmm(_by_row(queries), self.table_h.transpose(1, 2)), queries)
        along_w = _from_column(torch.bmm(_by_column(queries), self.table_w.transpose(1, 2)), queries)
        if shape.mask:
            # A masked row or column stays masked in the sum. Every block holds a pixel of the map, so no query loses all its keys.
            outside_y = _outside(shape.height, shape, shape.rows, queries.device)[first:last]
            outside_x = _outside(shape.width, shape, shape.columns, queries.device)
            along_h = along_h.masked_fill(outside_y[:, None, None, None, :], float("-inf"))
            along_w = along_w.masked_fill(outside_x[:, None, None, :], float("-inf"))
        scores = queries.new_empty(*queries.shape[:-1], shape.window, shape.window)  # a sum would keep the permuted order of along_h
        torch.add(along_h.unsqueeze(-1), along_w.unsqueeze(-2), out=scores)
        scores = scores.view(-1, shape.queries**2, shape.window**2)
        keys = self.window(self.k, image, first, last)
        scores.baddbmm_(queries.view(-1, shape.queries**2, queries.shape[-1]), keys, alpha=shape.scale)
        return torch.softmax(scores, -1, out=scores) if scores.device.type == "cpu" else scores.softmax(-1)


def _pad_queries(x: Tensor, shape: _Shape) -> Tensor:
    """Pad a map of queries to whole blocks."""
    bottom, right = shape.rows * shape.queries - x.shape[-2], shape.columns * shape.queries - x.shape[-1]
    return (F.pad(x, (0, right, 0, bottom)) if bottom or right else x).contiguous()


def _blocks(x: Tensor, shape: _Shape) -> Tensor:
    """View a padded map of queries (B, heads, d, H, W) as (B, heads, rows, columns, queries, queries, d)."""
    x = x.unflatten(-1, (shape.columns, shape.queries)).unflatten(-3, (shape.rows, shape.queries))
    return x.permute(0, 1, 3, 5, 4, 6, 2)


def _outside(size: int, shape: _Shape, count: int, device: torch.device) -> Tensor:
    """(blocks, window): whether a row (or column) of a block's window lies outside the map."""
    position = torch.arange(count, device=device).unsqueeze(1) * shape.block - shape.halo + torch.arange(shape.window, device=device)
    return (position < 0) | (position >= size)


# A position table has its own entries for each row (or column) of a block, so products with it are batched over those.


def _by_row(x: Tensor) -> Tensor:
    """(heads, rows, columns, i, j, d) -> (i, heads * rows * columns * j, d)."""
    return x.permute(3, 0, 1, 2, 4, 5).flatten(1, 4)


def _by_column(x: Tensor) -> Tensor:
    """(heads, rows, columns, i, j, d) -> (j, heads * rows * columns * i, d)."""
    return x.permute(4, 0, 1, 2, 3, 5).flatten(1, 4)


def _from_row(x: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_by_row`; the last dimension may be another."""
    heads, rows, columns, i, j, _ = like.shape
    return x.view(i, heads, rows, columns, j, -1).permute(1, 2, 3, 0, 4, 5)


def _from_column(x: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_by_column`; the last dimension may be another."""
    heads, rows, columns, i, j, _ = like.shape
    return x.view(j, heads, rows, columns, i, -1).permute(1, 2, 3, 4, 0, 5)
