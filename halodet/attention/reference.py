"""Reference implementation of halo attention, one query at a time. Slow; every backend is tested against it."""

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
    layout: BlockLayout,
) -> Tensor:
    """Compute halo attention query by query; tensors as in :func:`halodet.attention.halo_attention`."""
    tensors = (q, k, v, rel_h, rel_w, extra_k, extra_v)
    rows = [
        torch.stack([attend(*tensors, layout, y, x) for x in range(layout.query_width)], -1)
        for y in range(layout.query_height)
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
    layout: BlockLayout,
    query_y: int,
    query_x: int,
) -> Tensor:
    """Return the output (B, heads, d_v) of the query at (query_y, query_x)."""
    query = q[..., query_y, query_x]
    # The block of a query follows from its pixel in the full map; its index within the block counts queries.
    block_y, block_x = query_y * layout.stride // layout.block, query_x * layout.stride // layout.block
    i, j = query_y - block_y * layout.block // layout.stride, query_x - block_x * layout.block // layout.stride
    logits, values = [], []
    for r in range(layout.window_height):
        for c in range(layout.window_width):
            y, x = block_y * layout.block - layout.top + r, block_x * layout.block - layout.left + c
            inside = 0 <= y < layout.height and 0 <= x < layout.width
            if not inside and layout.mask:
                continue
            position = query @ (rel_h[layout.window_height - 1 + r - i] + rel_w[layout.window_width - 1 + c - j])
            if inside:
                logits.append((query * k[..., y, x]).sum(-1) * layout.scale + position)
                values.append(v[..., y, x])
            else:
                logits.append(position)
                values.append(torch.zeros_like(v[..., 0, 0]))
    for e in range(0 if extra_k is None else extra_k.shape[-2]):
        logits.append((query * extra_k[:, :, block_y, block_x, e]).sum(-1) * layout.scale)
        values.append(extra_v[:, :, block_y, block_x, e])
    weights = torch.stack(logits, -1).softmax(-1)
    return (torch.stack(values, -1) * weights.unsqueeze(-2)).sum(-1)
