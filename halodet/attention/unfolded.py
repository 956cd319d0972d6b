"""Halo attention over all blocks at once in plain PyTorch: the form that can be traced, exported and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def halo_attention_unfolded(
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
    """Halo attention with every window laid out in memory; arguments and result as :func:`halodet.attention.halo_attention`."""
    height, width = k.shape[-2:]
    window = block_size + 2 * halo_size
    grid = (-(-height // block_size), -(-width // block_size))

    queries = _query_blocks(q, block_size // stride, grid)
    keys = _windows(k, block_size, halo_size, grid).flatten(-2)
    values = _windows(v, block_size, halo_size, grid).flatten(-2)

    # rel[i, j] is the table row for query i and key j of the window, counted as timm counts it so that its weights load unchanged.
    i = torch.arange(block_size // stride, device=q.device)
    rows = window - 1 + torch.arange(window, device=q.device) - i.unsqueeze(1)
    logits_h = torch.einsum("bnyxijd,iwd->bnyxijw", queries, rel_h[rows])
    logits_w = torch.einsum("bnyxijd,jwd->bnyxijw", queries, rel_w[rows])
    if border == "mask":
        # A masked row or column stays masked in the sum below. Every block holds a pixel of the map, so no query loses all its keys.
        outside_y = _outside(height, block_size, halo_size, grid[0], q.device)
        outside_x = _outside(width, block_size, halo_size, grid[1], q.device)
        logits_h = logits_h.masked_fill(outside_y[:, None, None, None, :], float("-inf"))
        logits_w = logits_w.masked_fill(outside_x[:, None, None, :], float("-inf"))
    position = (logits_h.unsqueeze(-1) + logits_w.unsqueeze(-2)).flatten(-2).flatten(-3, -2)

    weights = (torch.matmul(queries.flatten(-3, -2) * scale, keys) + position).softmax(-1)
    out = torch.matmul(weights.to(values.dtype), values.transpose(-1, -2))
    return _unblock(out, block_size // stride, q.shape[-2:])


def _query_blocks(q: Tensor, block: int, grid: tuple[int, int]) -> Tensor:
    """(B, heads, d, H, W) -> (B, heads, rows of blocks, columns of blocks, block, block, d), padded to whole blocks."""
    rows, columns = grid
    q = F.pad(q, (0, columns * block - q.shape[-1], 0, rows * block - q.shape[-2]))
    q = q.unflatten(-1, (columns, block)).unflatten(-3, (rows, block))
    return q.permute(0, 1, 3, 5, 4, 6, 2).contiguous()


def _windows(x: Tensor, block: int, halo: int, grid: tuple[int, int]) -> Tensor:
    """(B, heads, d, H, W) -> (B, heads, rows of blocks, columns of blocks, d, window, window), zero outside the map."""
    height, width = x.shape[-2:]
    x = F.pad(x, (halo, grid[1] * block - width + halo, halo, grid[0] * block - height + halo))
    window = block + 2 * halo
    return x.unfold(-2, window, block).unfold(-2, window, block).permute(0, 1, 3, 4, 2, 5, 6)


def _outside(size: int, block: int, halo: int, count: int, device: torch.device) -> Tensor:
    """(blocks, window): whether a row (or column) of a block's window lies outside the map."""
    position = torch.arange(count, device=device).unsqueeze(1) * block - halo + torch.arange(block + 2 * halo, device=device)
    return (position < 0) | (position >= size)


def _unblock(out: Tensor, block: int, size: tuple[int, int]) -> Tensor:
    """(B, heads, rows of blocks, columns of blocks, block * block, d) -> (B, heads, d, H, W), cropped to ``size``."""
    out = out.unflatten(-2, (block, block)).permute(0, 1, 6, 2, 4, 3, 5)
    out = out.flatten(-2).flatten(-3, -2)
    return out[..., : size[0], : size[1]]
