"""Halo attention over all blocks at once in plain PyTorch, for tracing, export and ``torch.compile``.

All accesses are by index, so one exported graph works for maps of any height and width.
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
    layout: BlockLayout,
) -> Tensor:
    """Compute halo attention with all windows in memory; tensors as in :func:`halodet.attention.halo_attention`."""
    device = q.device
    # Map coordinates of each block's queries (blocks, queries) and window keys (blocks, window), per direction.
    query_y, key_y = _positions(layout.rows, layout.block, layout.queries, layout.top, layout.window_height, device)
    query_x, key_x = _positions(layout.columns, layout.block, layout.queries, layout.left, layout.window_width, device)
    inside_y, inside_x = (key_y >= 0) & (key_y < layout.height), (key_x >= 0) & (key_x < layout.width)

    # Coordinates outside the map read its edge; those queries are cropped at the end, keys and values zeroed or masked.
    queries = _gather(q, query_y.clamp(max=layout.query_height - 1), query_x.clamp(max=layout.query_width - 1))
    keys, values = (_gather(x, key_y.clamp(0, layout.height - 1), key_x.clamp(0, layout.width - 1)) for x in (k, v))
    if not layout.mask:
        inside = (inside_y[:, None, :, None] & inside_x[None, :, None, :]).unsqueeze(-1)
        keys, values = keys * inside, values * inside

    # Table rows of each query, indexed as in timm so that its weights load unchanged.
    i = torch.arange(layout.queries, device=device).unsqueeze(1)
    rows_h = layout.window_height - 1 + torch.arange(layout.window_height, device=device) - i  # (queries, window)
    rows_w = layout.window_width - 1 + torch.arange(layout.window_width, device=device) - i
    logits_h = torch.einsum("bnyxijd,iwd->bnyxijw", queries, rel_h[rows_h])
    logits_w = torch.einsum("bnyxijd,jwd->bnyxijw", queries, rel_w[rows_w])
    if layout.mask:
        # -inf in either term masks their sum. Every block has a pixel of the map, so no query loses all its keys.
        logits_h = logits_h.masked_fill(~inside_y[:, None, None, None, :], float("-inf"))
        logits_w = logits_w.masked_fill(~inside_x[:, None, None, :], float("-inf"))
    position = (logits_h.unsqueeze(-1) + logits_w.unsqueeze(-2)).flatten(-2).flatten(-3, -2)

    queries, keys, values = queries.flatten(-3, -2) * layout.scale, keys.flatten(-3, -2), values.flatten(-3, -2)
    scores = torch.matmul(queries, keys.transpose(-1, -2)) + position
    if extra_k is not None:
        scores = torch.cat((scores, torch.matmul(queries, extra_k.transpose(-1, -2))), -1)
        values = torch.cat((values, extra_v), -2)
    out = torch.matmul(scores.softmax(-1).to(values.dtype), values)

    # Gather the queries of the map and drop the padding of the last block. A slice would bind an exported graph to
    # maps that the block size does (or does not) divide; indexing by quotient and remainder is miscompiled by some
    # versions of torch.compile (12 × 18 in blocks of 12).
    out = out.unflatten(-2, (layout.queries, layout.queries)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    y, x = (
        torch.arange(layout.query_height, device=device).unsqueeze(1),
        torch.arange(layout.query_width, device=device),
    )
    return out[:, :, y, x].permute(0, 1, 4, 2, 3)


def _positions(
    count: int, block: int, queries: int, before: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the queries (count, queries) and keys (count, window) of blocks in one direction."""
    blocks = torch.arange(count, device=device).unsqueeze(1)
    keys = blocks * block - before + torch.arange(window, device=device)
    return blocks * queries + torch.arange(queries, device=device), keys


def _gather(x: Tensor, y: Tensor, x_positions: Tensor) -> Tensor:
    """Gather (B, heads, d, H, W) at rows (rows, h) and columns (columns, w) as (B, heads, rows, columns, h, w, d)."""
    return x[..., y[:, None, :, None], x_positions[:, None, :]].permute(0, 1, 3, 4, 5, 6, 2)
