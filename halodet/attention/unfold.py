"""Halo attention over all blocks at once in plain PyTorch: the form that can be traced, exported and compiled, for maps of any size.

Everything is addressed by index, so that one exported graph serves every height and width.
"""

from __future__ import annotations

from halodet.attention.layout import BlockLayout

import torch
from torch import Tensor


def halo_attention_unfold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    shape: BlockLayout,
) -> Tensor:
    """Halo attention with every window laid out in memory; tensors as in :func:`halodet.attention.halo_attention`."""
    device = q.device
    # Per direction: the position in the map of each query of each block (blocks, queries) and of each key of its window (blocks, window).
    query_y, key_y = _positions(shape.rows, shape.block, shape.queries, shape.top, shape.window_height, device)
    query_x, key_x = _positions(shape.columns, shape.block, shape.queries, shape.left, shape.window_width, device)
    inside_y, inside_x = (key_y >= 0) & (key_y < shape.height), (key_x >= 0) & (key_x < shape.width)

    # Positions beyond the map are read at its edge: queries there are cut off in the end, keys and values are zeroed or masked below.
    queries = _take(q, query_y.clamp(max=shape.query_height - 1), query_x.clamp(max=shape.query_width - 1))
    keys, values = (_take(x, key_y.clamp(0, shape.height - 1), key_x.clamp(0, shape.width - 1)) for x in (k, v))
    if not shape.mask:
        inside = (inside_y[:, None, :, None] & inside_x[None, :, None, :]).unsqueeze(-1)
        keys, values = keys * inside, values * inside

    # Each query needs its own rows of the tables, counted as timm counts them so that its weights load unchanged.
    i = torch.arange(shape.queries, device=device).unsqueeze(1)
    rows_h = shape.window_height - 1 + torch.arange(shape.window_height, device=device) - i  # (queries, window)
    rows_w = shape.window_width - 1 + torch.arange(shape.window_width, device=device) - i
    logits_h = torch.einsum("bnyxijd,iwd->bnyxijw", queries, rel_h[rows_h])
    logits_w = torch.einsum("bnyxijd,jwd->bnyxijw", queries, rel_w[rows_w])
    if shape.mask:
        # A masked row or column stays masked in the sum below. Every block holds a pixel of the map, so no query loses all its keys.
        logits_h = logits_h.masked_fill(~inside_y[:, None, None, None, :], float("-inf"))
        logits_w = logits_w.masked_fill(~inside_x[:, None, None, :], float("-inf"))
    position = (logits_h.unsqueeze(-1) + logits_w.unsqueeze(-2)).flatten(-2).flatten(-3, -2)

    queries, keys, values = queries.flatten(-3, -2) * shape.scale, keys.flatten(-3, -2), values.flatten(-3, -2)
    scores = torch.matmul(queries, keys.transpose(-1, -2)) + position
    if extra_k is not None:
        scores = torch.cat((scores, torch.matmul(queries, extra_k.transpose(-1, -2))), -1)
        values = torch.cat((values, extra_v), -2)
    out = torch.matmul(scores.softmax(-1).to(values.dtype), values)

    # Every query is fetched from its place in the blocks laid side by side: what completes the last block is left behind. A slice would tie
    # an exported graph to maps that blocks do, or do not, divide, and to fetch by quotient and remainder of the position goes wrong in
    # some versions of PyTorch's compiler (12 × 18 in blocks of 12).
    out = out.unflatten(-2, (shape.queries, shape.queries)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    y, x = torch.arange(shape.query_height, device=device).unsqueeze(1), torch.arange(shape.query_width, device=device)
    return out[:, :, y, x].permute(0, 1, 4, 2, 3)


def _positions(
    count: int, block: int, queries: int, before: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the queries and the keys of ``count`` blocks lie: (count, queries) in the map of queries, (count, window) in that of keys."""
    blocks = torch.arange(count, device=device).unsqueeze(1)
    return blocks * queries + torch.arange(queries, device=device), blocks * block - before + torch.arange(
        window, device=device
    )


def _take(x: Tensor, y: Tensor, x_positions: Tensor) -> Tensor:
    """(B, heads, d, H, W), (rows, h), (columns, w) -> (B, heads, rows, columns, h, w, d)."""
    return x[..., y[:, None, :, None], x_positions[:, None, :]].permute(0, 1, 3, 4, 5, 6, 2)
