"""The definition of halo attention: an explicit gather and softmax per query. Slow; every backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor


def halo_attention_reference(
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
    """Halo attention, one query at a time; arguments and result as :func:`halodet.attention.halo_attention`."""
    height, width = k.shape[-2:]
    window = block_size + 2 * halo_size
    rows = []
    for qy in range(q.shape[-2]):
        row = []
        for qx in range(q.shape[-1]):
            query = q[..., qy, qx]
            # The block a query lies in is that of its pixel in the full map; its number inside the block counts queries, not pixels.
            block_y, block_x = qy * stride // block_size, qx * stride // block_size
            i, j = qy - block_y * block_size // stride, qx - block_x * block_size // stride
            logits, values = [], []
            for r in range(window):
                for c in range(window):
                    y, x = block_y * block_size - halo_size + r, block_x * block_size - halo_size + c
                    inside = 0 <= y < height and 0 <= x < width
                    if not inside and border == "mask":
                        continue
                    position = query @ (rel_h[window - 1 + r - i] + rel_w[window - 1 + c - j])
                    if inside:
                        logits.append((query * k[..., y, x]).sum(-1) * scale + position)
                        values.append(v[..., y, x])
                    else:
                        logits.append(position)
                        values.append(torch.zeros_like(v[..., 0, 0]))
            weights = torch.stack(logits, -1).softmax(-1)
            row.append((torch.stack(values, -1) * weights.unsqueeze(-2)).sum(-1))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)
