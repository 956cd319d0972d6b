"""The definition of halo attention: an explicit gather and softmax per query. Slow; every backend is tested against it."""

from __future__ import annotations

from halodet.attention.layout import BlockLayout

import torch
from torch import Tensor


def halo_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    shape: BlockLayout,
) -> Tensor:
    """Halo attention, one query at a time; tensors as in :func:`halodet.attention.halo_attention`."""
    rows = [
        torch.stack(
            [attend(q, k, v, rel_h, rel_w, extra_k, extra_v, shape, y, x) for x in range(shape.query_width)], -1
        )
        for y in range(shape.query_height)
    ]
    return torch.stack(rows, -2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    shape: BlockLayout,
    query_y: int,
    query_x: int,
) -> Tensor:
    """What the query at (query_y, query_x) gets: (B, heads, d_v)."""
    query = q[..., query_y, query_x]
    # The block a query lies in is that of its pixel in the full map; its number inside the block counts queries, not pixels.
    block_y, block_x = query_y * shape.stride // shape.block, query_x * shape.stride // shape.block
    i, j = query_y - block_y * shape.block // shape.stride, query_x - block_x * shape.block // shape.stride
    logits, values = [], []
    for r in range(shape.window_height):
        for c in range(shape.window_width):
            y, x = block_y * shape.block - shape.top + r, block_x * shape.block - shape.left + c
            inside = 0 <= y < shape.height and 0 <= x < shape.width
            if not inside and shape.mask:
                continue
            position = query @ (rel_h[shape.window_height - 1 + r - i] + rel_w[shape.window_width - 1 + c - j])
            if inside:
                logits.append((query * k[..., y, x]).sum(-1) * shape.scale + position)
                values.append(v[..., y, x])
            else:
                logits.append(position)
                values.append(torch.zeros_like(v[..., 0, 0]))
    for e in range(0 if extra_k is None else extra_k.shape[-2]):
        logits.append((query * extra_k[:, :, block_y, block_x, e]).sum(-1) * shape.scale)
        values.append(extra_v[:, :, block_y, block_x, e])
    weights = torch.stack(logits, -1).softmax(-1)
    return (torch.stack(values, -1) * weights.unsqueeze(-2)).sum(-1)
