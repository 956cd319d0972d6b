"""Halo attention in plain PyTorch, one chunk of blocks at a time, for any device and map size.

Only one chunk of windows and scores exists at a time, small enough for the CPU cache. The backward recomputes the
attention weights of large maps: reusing the log-sum-exp would need ``exp``, which is slower than PyTorch's softmax.
Weights of small maps are kept, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from halodet.attention.layout import BlockLayout

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 4 << 20}  # scores per chunk; fastest where they fit in the cache
CHUNK_BYTES_ELSEWHERE = 256 << 20  # a GPU needs more work per kernel launch
KEPT_BYTES = {"cpu": 64 << 20}  # attention weights of one call that are kept for its backward; elsewhere none


def halo_attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    layout: BlockLayout,
) -> Tensor:
    """Compute halo attention in chunks; tensors as in :func:`halodet.attention.halo_attention`. Differentiable once."""
    return _HaloAttention.apply(q, k, v, rel_h, rel_w, extra_k, extra_v, layout)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast: arguments and buffers share one dtype. Some devices (meta) do not support autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _HaloAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.layout = arguments
        kept: list[Tensor] = []
        out = attend(*arguments, kept=kept if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        return *attend_backward(grad, *tensors[:7], ctx.layout, kept=tensors[7:]), None


def attend(*arguments: Any, kept: list[Tensor] | None = None) -> Tensor:
    """Compute :func:`halo_attention_blocked` without autograd; append attention weights to ``kept`` if they are few."""
    *tensors, layout = arguments
    with _without_autocast(tensors[0].device):
        work = _Work(*tensors, layout)
        out = work.v.new_empty(*work.q.shape[:4], work.v.shape[4])
        tiles = list(work)
        keep = kept is not None and work.weight_bytes(tiles) <= KEPT_BYTES.get(out.device.type, 0)
        for tile in tiles:
            queries, keys = work.queries_and_keys(tile)
            weights = work.weights(tile, queries, keys, reuse_buffer=not keep)
            if kept is not None and keep:
                kept.append(weights)
            mixed = work.buffer("out", len(weights), tile.queries, out.shape[4])
            torch.bmm(weights, work.windows(tile, work.v, work.extra_v, "values"), out=mixed)
            part = work.queries_of(out, tile)
            part.copy_(mixed.view(part.shape))
    return _channels_third(out)


def attend_backward(grad: Tensor, *arguments: Any, kept: Sequence[Tensor] = ()) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors that :func:`attend` takes; None for absent extra keys and values.

    ``kept`` has the attention weights of each tile, or is empty.
    """
    *tensors, layout = arguments
    with _without_autocast(grad.device):
        work = _Work(*tensors, layout)
        grad = _channels_last(grad.to(work.q.dtype))
        grad_q = torch.empty_like(work.q, memory_format=torch.contiguous_format)
        grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (work.k, work.v))
        grad_extra_k, grad_extra_v = (None if x is None else torch.empty_like(x) for x in (work.extra_k, work.extra_v))
        # Sums over the whole map are accumulated in float32 at least.
        exact = torch.promote_types(work.q.dtype, torch.float32)
        grad_h, grad_w = (torch.zeros_like(x, dtype=exact) for x in (work.rel_h, work.rel_w))
        for index, tile in enumerate(work):
            queries, keys = work.queries_and_keys(tile)
            weights = kept[index] if kept else work.weights(tile, queries, keys)
            values = work.windows(tile, work.v, work.extra_v, "values")
            grad_out = work.buffer("out", len(weights), tile.queries, grad.shape[4])
            part = work.queries_of(grad, tile)
            grad_out.view(part.shape).copy_(part)
            window = work.buffer("window", *values.shape)
            torch.bmm(weights.transpose(1, 2), grad_out, out=window)
            work.add_windows(tile, window, grad_v, grad_extra_v)
            scores = work.buffer("grad_scores", *weights.shape)
            torch.bmm(grad_out, values.transpose(1, 2), out=scores)
            torch.ops.aten._softmax_backward_data.out(scores, weights, -1, weights.dtype, grad_input=scores)
            window = work.buffer("window", *keys.shape)
            window.baddbmm_(scores.transpose(1, 2), queries, beta=0, alpha=layout.scale)
            work.add_windows(tile, window, grad_k, grad_extra_k)

            grad_positions = work.grad_positions(tile, scores)
            rows_h, rows_w = work.table_rows(tile)
            grad_table = grad_positions.t() @ queries.flatten(0, 1)
            grad_h[rows_h] += grad_table[: rows_h.stop - rows_h.start]
            grad_w[rows_w] += grad_table[rows_h.stop - rows_h.start :]
            grad_queries = work.buffer("grad_queries", *queries.shape)
            grad_queries.baddbmm_(scores, keys, beta=0, alpha=layout.scale)
            grad_queries.view(-1, queries.shape[2]).addmm_(grad_positions, work.table(tile))
            part = work.queries_of(grad_q, tile)
            part.copy_(grad_queries.view(part.shape))
    grad_k, grad_v = (
        x[:, work.top : work.top + layout.height, work.left : work.left + layout.width] for x in (grad_k, grad_v)
    )
    maps = [_channels_third(x) for x in (grad_q, grad_k, grad_v)]
    return *maps, grad_h.to(grad.dtype), grad_w.to(grad.dtype), grad_extra_k, grad_extra_v


class _Span(NamedTuple):
    """Neighboring blocks with the same number of queries and window size in one direction."""

    first: int
    count: int
    queries: int  # per block, in this direction
    skip: int  # masked pixels at the start of each window
    window: int  # unmasked pixels of each window


class _Tile(NamedTuple):
    """Blocks processed together: those in ``rows`` and ``columns`` of ``images`` images."""

    image: int
    images: int
    rows: _Span
    columns: _Span

    @property
    def queries(self) -> int:
        return self.rows.queries * self.columns.queries


class _Work:
    """Maps of one call in channels-last order (B, H, W, heads, d) and the operations on a tile of them.

    The first dimension N of intermediate tensors is images × heads × rows × columns of blocks.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rel_h: Tensor,
        rel_w: Tensor,
        extra_k: Tensor | None,
        extra_v: Tensor | None,
        layout: BlockLayout,
    ) -> None:
        self.layout, self.rel_h, self.rel_w, self.extra_k, self.extra_v = layout, rel_h, rel_w, extra_k, extra_v
        self.q, self.k, self.v = (_channels_last(x) for x in (q, k, v))
        self.top = self.left = 0  # padding before the maps
        if not layout.mask:
            self.top, self.left = layout.top, layout.left
            right = layout.columns * layout.block - layout.width + layout.right
            bottom = layout.rows * layout.block - layout.height + layout.bottom
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, layout.left, right, layout.top, bottom)) for x in (self.k, self.v))
        self.buffers: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[_Tile]:
        """Iterate over tiles whose scores fit in the chunk size."""
        layout, (batch, heads, extra) = (
            self.layout,
            (self.q.shape[0], self.q.shape[3], 0 if self.extra_k is None else self.extra_k.shape[4]),
        )
        budget = CHUNK_BYTES.get(self.q.device.type, CHUNK_BYTES_ELSEWHERE)
        for rows in _spans(layout.height, layout.rows, layout.top, layout.window_height, layout):
            for columns in _spans(layout.width, layout.columns, layout.left, layout.window_width, layout):
                scores = rows.queries * columns.queries * (rows.window * columns.window + extra)
                blocks = max(1, budget // (heads * scores * self.q.element_size()))
                column_step = _even(columns.count, blocks)
                row_step = _even(rows.count, blocks // columns.count)
                image_step = _even(batch, blocks // (columns.count * rows.count))
                for image in range(0, batch, image_step):
                    for some_rows in _split(rows, row_step):
                        for some_columns in _split(columns, column_step):
                            yield _Tile(image, min(image_step, batch - image), some_rows, some_columns)

    def weight_bytes(self, tiles: Sequence[_Tile]) -> int:
        """Return the size of the attention weights of these tiles."""
        extra = 0 if self.extra_k is None else self.extra_k.shape[4]
        counts = (
            tile.images * tile.rows.count * tile.columns.count * tile.queries
            * (tile.rows.window * tile.columns.window + extra)
            for tile in tiles
        )  # fmt: skip
        return sum(counts) * self.q.shape[3] * self.q.element_size()

    def buffer(self, name: str, *size: int) -> Tensor:
        """Return a view of a buffer that all tiles share."""
        count = torch.Size(size).numel()
        if name not in self.buffers or self.buffers[name].numel() < count:
            self.buffers[name] = self.q.new_empty(count)
        return self.buffers[name][:count].view(size)

    def queries_of(self, x: Tensor, tile: _Tile) -> Tensor:
        """View a map of queries (B, H, W, heads, d) as (images, heads, rows, columns, queries, queries, d)."""
        step = self.layout.queries
        return _blocks(
            x, tile, tile.rows.first * step, tile.columns.first * step, step, tile.rows.queries, tile.columns.queries
        )

    def windows_of(self, x: Tensor, tile: _Tile, down: int = 0, right: int = 0, limit: int | None = None) -> Tensor:
        """View a map of keys or values as windows (images, heads, rows, columns, window, window, d).

        Only the part of each window from (``down``, ``right``) on, at most ``limit`` pixels wide and high.
        """
        y = tile.rows.first * self.layout.block - self.layout.top + self.top + tile.rows.skip + down
        x0 = tile.columns.first * self.layout.block - self.layout.left + self.left + tile.columns.skip + right
        size = [tile.rows.window - down, tile.columns.window - right]
        if limit is not None:
            size = [min(limit, s) for s in size]
        return _blocks(x, tile, y, x0, self.layout.block, *size)

    def windows(self, tile: _Tile, x: Tensor, extra: Tensor | None, name: str) -> Tensor:
        """Copy the windows of a map, followed by the extra keys or values: (N, keys, d)."""
        view = self.windows_of(x, tile)
        size = tile.rows.window * tile.columns.window
        copy = self.buffer(name, *view.shape[:4], size + (0 if extra is None else extra.shape[4]), view.shape[6])
        copy[..., :size, :].unflatten(-2, view.shape[4:6]).copy_(view)
        if extra is not None:
            copy[..., size:, :] = _extra_of(extra, tile)
        return copy.flatten(0, 3)

    def add_windows(self, tile: _Tile, windows: Tensor, x: Tensor, extra: Tensor | None) -> None:
        """Scatter-add windows, the transpose of :meth:`windows`. Windows overlap, parts of block size do not."""
        block, (height, width) = self.layout.block, (tile.rows.window, tile.columns.window)
        windows = windows.view(tile.images, -1, tile.rows.count, tile.columns.count, *windows.shape[1:])
        if extra is not None:
            _extra_of(extra, tile).copy_(windows[..., height * width :, :])
        windows = windows[..., : height * width, :].unflatten(-2, (height, width))
        for down in range(0, height, block):
            for right in range(0, width, block):
                part = self.windows_of(x, tile, down, right, block)
                part += windows[..., down : down + block, right : right + block, :]

    def table_rows(self, tile: _Tile) -> tuple[slice, slice]:
        """Return the rows of the two position tables that a tile needs."""
        return tuple(
            slice(window - span.queries + span.skip, window - 1 + span.skip + span.window)
            for span, window in ((tile.rows, self.layout.window_height), (tile.columns, self.layout.window_width))
        )

    def table(self, tile: _Tile) -> Tensor:
        """Return these rows of both tables, concatenated."""
        rows_h, rows_w = self.table_rows(tile)
        return torch.cat((self.rel_h[rows_h], self.rel_w[rows_w]))

    def positions_of(self, products: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
        """View the query-table products (N * queries, rows) as logits (N, i, j, window) for the height and the width.

        Query i needs the rows from ``queries - 1 - i`` on, which is expressible as a stride instead of a gather.
        """
        (rows, columns), count = (tile.rows, tile.columns), products.shape[1]
        row, block, start = columns.queries * count, tile.queries * count, products.storage_offset()
        size, blocks = (rows.queries, columns.queries), len(products) // tile.queries
        height = products.as_strided((blocks, *size, rows.window), (block, row - 1, count, 1), start + rows.queries - 1)
        start += rows.queries + rows.window - 1
        return height, products.as_strided(
            (blocks, *size, columns.window), (block, row, count - 1, 1), start + columns.queries - 1
        )

    def queries_and_keys(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """Copy the queries (N, queries, d) and keys (N, keys, d) of a tile."""
        view = self.queries_of(self.q, tile)
        queries = self.buffer("queries", *view.shape).copy_(view).view(-1, tile.queries, view.shape[6])
        return queries, self.windows(tile, self.k, self.extra_k, "keys")

    def weights(self, tile: _Tile, queries: Tensor, keys: Tensor, reuse_buffer: bool = True) -> Tensor:
        """Compute attention weights (N, queries, keys)."""
        table = self.table(tile)
        products = torch.mm(
            queries.flatten(0, 1), table.t(), out=self.buffer("products", queries.shape[0] * tile.queries, len(table))
        )
        size = (*queries.shape[:2], keys.shape[1])
        scores = self.buffer("scores", *size) if reuse_buffer else queries.new_empty(size)
        along_h, along_w = self.positions_of(products, tile)
        pixels = tile.rows.window * tile.columns.window
        inside = (
            scores[..., :pixels].unflatten(-1, (tile.rows.window, tile.columns.window)).unflatten(1, along_h.shape[1:3])
        )
        torch.add(along_h.unsqueeze(-1), along_w.unsqueeze(-2), out=inside)
        if self.extra_k is not None:
            scores[..., pixels:] = 0
        scores.baddbmm_(queries, keys.transpose(1, 2), alpha=self.layout.scale)
        return torch.softmax(scores, -1, out=scores) if scores.device.type == "cpu" else scores.softmax(-1)

    def grad_positions(self, tile: _Tile, grad_scores: Tensor) -> Tensor:
        """Backpropagate score gradients to the query-table products: sums over the other direction."""
        (rows, columns), count = (
            (tile.rows, tile.columns),
            sum(rows.stop - rows.start for rows in self.table_rows(tile)),
        )
        size = (len(grad_scores) * tile.queries, count)
        # Tiles of the same shape write to the same elements, so zeroing the buffer once is enough.
        name = f"grad_products {size} {rows.queries} {rows.window} {columns.window}"
        if name not in self.buffers:
            self.buffers[name] = grad_scores.new_zeros(size)
        along_h, along_w = self.positions_of(self.buffers[name], tile)
        inside = grad_scores[..., : rows.window * columns.window].unflatten(-1, (rows.window, columns.window))
        inside = inside.unflatten(1, (rows.queries, columns.queries))
        torch.sum(inside, -1, out=along_h)
        torch.sum(inside, -2, out=along_w)
        return self.buffers[name]


def _channels_last(x: Tensor) -> Tensor:
    """Permute (B, heads, d, H, W) to (B, H, W, heads, d) with contiguous channels."""
    x = x.permute(0, 3, 4, 1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _channels_third(x: Tensor) -> Tensor:
    """Permute (B, H, W, heads, d) to (B, heads, d, H, W)."""
    return x.permute(0, 3, 4, 1, 2)


def _blocks(x: Tensor, tile: _Tile, y: int, x0: int, step: int, height: int, width: int) -> Tensor:
    """View (B, H, W, heads, d) as rectangles ``step`` apart, the first at (y, x0).

    Shape (images, heads, rows, columns, height, width, d).
    """
    image, down, right, head, channel = x.stride()
    size = (tile.images, x.shape[3], tile.rows.count, tile.columns.count, height, width, x.shape[4])
    start = x.storage_offset() + tile.image * image + y * down + x0 * right
    return x.as_strided(size, (image, head, step * down, step * right, down, right, channel), start)


def _extra_of(extra: Tensor, tile: _Tile) -> Tensor:
    """Return the extra keys or values (images, heads, rows, columns, E, d) of a tile."""
    rows, columns = tile.rows, tile.columns
    return extra[
        tile.image : tile.image + tile.images,
        :,
        rows.first : rows.first + rows.count,
        columns.first : columns.first + columns.count,
    ]


def _spans(size: int, blocks: int, before: int, window: int, layout: BlockLayout) -> list[_Span]:
    """Group the blocks of one direction into spans of equal shape.

    The last block may have fewer queries; with a masked border windows are cropped to the map.
    """
    spans: list[_Span] = []
    for block in range(blocks):
        start = block * layout.block
        queries = -(-min(layout.block, size - start) // layout.stride)
        skip = max(0, before - start) if layout.mask else 0
        left = min(window, size - start + before) - skip if layout.mask else window
        if spans and spans[-1][2:] == (queries, skip, left):
            spans[-1] = spans[-1]._replace(count=spans[-1].count + 1)
        else:
            spans.append(_Span(block, 1, queries, skip, left))
    return spans


def _even(count: int, most: int) -> int:
    """Return the step that splits ``count`` into the fewest equal parts of at most ``most``."""
    parts = -(-count // max(1, min(count, most)))
    return -(-count // parts)


def _split(span: _Span, step: int) -> Iterator[_Span]:
    for first in range(0, span.count, step):
        yield span._replace(first=span.first + first, count=min(step, span.count - first))
