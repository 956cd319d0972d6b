"""Straightforward forms of mixers that attend to the window of a block, or to the whole map."""

from __future__ import annotations

from halodet.benchmark.plain_neighborhoods import split_heads
from halodet.mixers.blockwise import BlockwiseMixer
from halodet.mixers.botnet import BoTNetMixer, interpolate_rel_pos
from halodet.mixers.focal import FocalMixer, surrounding_blocks
from halodet.mixers.halo import HaloMixer
from halodet.mixers.lesa import LesaMixer
from halodet.mixers.plg import PlgMixer

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def blockwise(mixer: BlockwiseMixer, x: Tensor) -> Tensor:
    """Attend tile by tile."""
    (height, width), block = x.shape[-2:], mixer.block_size
    top, bottom, left, right = mixer.halo_size
    parts = mixer.qkv(x).split((mixer.channels, mixer.channels, mixer.out_channels), 1)
    q, k, v = (split_heads(part, mixer.num_heads) for part in parts)
    rows = []
    for y in range(0, height, block):
        row = []
        for z in range(0, width, block):
            window = (..., slice(max(0, y - top), y + block + bottom), slice(max(0, z - left), z + block + right))
            queries, keys, values = q[..., y : y + block, z : z + block], k[window], v[window]
            weights = torch.einsum("bndi,bndj->bnij", queries.flatten(3), keys.flatten(3)).softmax(-1)
            out = torch.einsum("bnij,bndj->bndi", weights, values.flatten(3))
            row.append(out.unflatten(-1, queries.shape[-2:]))
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2).flatten(1, 2)


def botnet(mixer: BoTNetMixer, x: Tensor) -> Tensor:
    """Compute all weights between pixels; for the whole map as one window."""
    height, width = x.shape[-2:]
    parts = mixer.qkv(x).split((mixer.qk_channels, mixer.qk_channels, mixer.out_channels), 1)
    q, k, v = (split_heads(part, mixer.num_heads) for part in parts)
    rel_h = interpolate_rel_pos(mixer.pos_embed.height_rel, height, height, mixer.position)
    rel_w = interpolate_rel_pos(mixer.pos_embed.width_rel, width, width, mixer.position)
    along_h = torch.einsum("bndyx,yid->bnyxi", q, rel_h[offset_rows(height, height, height - 1, 0, x.device)])
    along_w = torch.einsum("bndyx,xjd->bnyxj", q, rel_w[offset_rows(width, width, width - 1, 0, x.device)])
    logits = torch.einsum("bndyx,bndij->bnyxij", q * mixer.depth**-0.5, k)
    weights = (logits + along_h.unsqueeze(-1) + along_w.unsqueeze(-2)).flatten(-2).softmax(-1)
    return torch.einsum("bnyxj,bndj->bndyx", weights, v.flatten(3)).flatten(1, 2)


def halo(mixer: HaloMixer, x: Tensor) -> Tensor:
    """Unfold all windows, as timm does, and mask the pixels outside the map."""
    queries, values, logits = _unfold_halo(mixer, x)
    out = torch.einsum("bnrcijw,bndrcw->bndrcij", logits.flatten(-2).softmax(-1), values.flatten(-2))
    return join_blocks(out, *x.shape[-2:]).flatten(1, 2)


def focal(mixer: FocalMixer, x: Tensor) -> Tensor:
    """Unfold all windows and the pooled tokens around each block, with one softmax."""
    if not mixer.focal_window:
        return halo(mixer, x)
    block = mixer.block_size
    queries, values, logits = _unfold_halo(mixer, x)
    pixels = split_blocks(x.unsqueeze(1), block)[:, 0]
    count = split_blocks(x.new_ones(1, 1, 1, *x.shape[2:]), block)[:, 0].sum((-2, -1))
    tokens = torch.einsum("bcruij,ij->bcru", pixels, mixer.pool_weight) * block**2 / count
    rows, row_offsets = surrounding_blocks(tokens.shape[2], mixer.focal_window, x.device)
    columns, column_offsets = surrounding_blocks(tokens.shape[3], mixer.focal_window, x.device)
    near = split_heads(mixer.kv(tokens), mixer.num_heads)[..., rows[:, None, :, None], columns[:, None, :]]
    pooled_keys, pooled_values = near.split((mixer.depth, mixer.value_depth), 2)
    along_h = torch.einsum("bndrcij,rfd->bnrcijf", queries, mixer.focal_pos.height_rel[row_offsets])
    along_w = torch.einsum("bndrcij,cgd->bnrcijg", queries, mixer.focal_pos.width_rel[column_offsets])
    pooled = torch.einsum("bndrcij,bndrcfg->bnrcijfg", queries * mixer.depth**-0.5, pooled_keys)
    pooled = pooled + along_h.unsqueeze(-1) + along_w.unsqueeze(-2)
    weights = torch.cat((logits.flatten(-2), pooled.flatten(-2)), -1).softmax(-1)
    values = torch.cat((values.flatten(-2), pooled_values.flatten(-2)), -1)
    out = torch.einsum("bnrcijw,bndrcw->bndrcij", weights, values)
    return join_blocks(out, *x.shape[-2:]).flatten(1, 2)


def lesa(mixer: LesaMixer, x: Tensor) -> Tensor:
    """Stack the logits of content and position of all pairs of pixels, or of all blocks and windows."""
    height, width = x.shape[-2:]
    sizes = (mixer.depth, mixer.depth, mixer.value_depth)
    q, k, v = split_heads(mixer.qkv(x), mixer.num_heads).split(sizes, 2)
    inside = x.new_ones(1, 1, 1, height, width)
    if mixer.binary == "global":
        halo_size, queries, keys, values = 0, *(part[:, :, :, None, None] for part in (q, k, v))
        valid_queries = valid_keys = inside[:, :, :, None, None]
    else:
        halo_size, block = mixer.halo_size, mixer.block_size
        queries, valid_queries = split_blocks(q, block), split_blocks(inside, block)
        keys, values, valid_keys = (split_windows(part, block, halo_size) for part in (k, v, inside))
    last = mixer.table_size - 1
    index_h, index_w = (
        offset_rows(queries.shape[i], keys.shape[i], last, halo_size, x.device).clamp(0, 2 * last) for i in (-2, -1)
    )
    rel_h, rel_w = mixer.pos_embed.height_rel[index_h], mixer.pos_embed.width_rel[index_w]
    content, position = window_logits(queries, keys, rel_h, rel_w)
    logits = torch.cat((content, position), 1)
    normalized = mixer.norm_logits
    if mixer.binary == "halo" and isinstance(normalized, nn.BatchNorm2d) and normalized.training:
        # Statistics cover only pairs inside the map.
        pairs = torch.einsum("bndrcij,bndrcuw->rcijuw", valid_queries, valid_keys).flatten().nonzero().squeeze(1)
        part = normalized(logits.flatten(2)[..., pairs].unsqueeze(3)).squeeze(3)
        logits = torch.zeros_like(logits).flatten(2).index_copy(2, pairs, part).view_as(logits)
    else:
        logits = normalized(logits.flatten(2).unsqueeze(3)).view_as(logits)
    content, position = logits.chunk(2, 1)
    outside = valid_keys[:, :, 0, :, :, None, None] == 0
    weights = (content + position).masked_fill(outside, float("-inf")).flatten(-2).softmax(-1)
    out = torch.einsum("bnrcijw,bndrcw->bndrcij", weights, values.flatten(-2))
    binary = mixer.norm_binary(join_blocks(out, height, width).flatten(1, 2))
    unary = mixer.unary(x)
    return unary + mixer.gate(torch.cat((unary, binary), 1)) * binary


def plg(mixer: PlgMixer, x: Tensor) -> Tensor:
    """Attend to unfolded windows, and to the grid of PyTorch's adaptive pooling."""
    grid = F.adaptive_avg_pool2d(x, mixer.grid_size) + F.adaptive_max_pool2d(x, mixer.grid_size)
    sizes = (mixer.qk_channels, mixer.out_channels // 2)
    k, v = (split_heads(part, mixer.num_heads).flatten(3) for part in mixer.kv(grid).split(sizes, 1))
    q = split_heads(mixer.q(x), mixer.num_heads)
    weights = torch.einsum("bndyx,bndg->bnyxg", q * k.shape[2] ** -0.5, k).softmax(-1)
    out = torch.einsum("bnyxg,bndg->bndyx", weights, v).flatten(1, 2)
    return torch.cat((halo(mixer.local, x), out), 1)


def split_blocks(x: Tensor, block: int) -> Tensor:
    """(B, heads, d, H, W) -> (B, heads, d, rows, columns, block, block), padded with zeros."""
    return split_windows(x, block, 0)


def split_windows(x: Tensor, block: int, halo_size: int) -> Tensor:
    """(B, heads, d, H, W) -> (B, heads, d, rows, columns, window, window), with zeros outside the map."""
    bottom, right, window = -x.shape[-2] % block, -x.shape[-1] % block, block + 2 * halo_size
    x = F.pad(x, (halo_size, halo_size + right, halo_size, halo_size + bottom))
    return x.unfold(-2, window, block).unfold(-2, window, block)


def join_blocks(x: Tensor, height: int, width: int) -> Tensor:
    """(B, heads, d, rows, columns, block, block) -> (B, heads, d, height, width); crops the padding."""
    return x.transpose(4, 5).flatten(5, 6).flatten(3, 4)[..., :height, :width]


def offset_rows(queries: int, window: int, last: int, halo_size: int, device: torch.device) -> Tensor:
    """Return table rows (queries, window) of one direction, where row ``last`` is that of the query itself."""
    key = torch.arange(window, device=device) - halo_size
    return last + key - torch.arange(queries, device=device).unsqueeze(1)


def window_logits(queries: Tensor, keys: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of content and of position (B, heads, rows, columns, h, w, window, window).

    Args:
        queries: from :func:`split_blocks`.
        keys: from :func:`split_windows`.
        rel_h: relative positions (h, window, d) for the height.
        rel_w: relative positions (w, window, d) for the width.
    """
    along_h = torch.einsum("bndrcij,iud->bnrciju", queries, rel_h)
    along_w = torch.einsum("bndrcij,jwd->bnrcijw", queries, rel_w)
    return torch.einsum("bndrcij,bndrcuw->bnrcijuw", queries, keys), along_h.unsqueeze(-1) + along_w.unsqueeze(-2)


def _unfold_halo(mixer: HaloMixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, values and masked logits of blocks and windows."""
    block, halo_size = mixer.block_size, mixer.halo_size
    queries = split_blocks(split_heads(mixer.q(x), mixer.num_heads), block)
    windows = split_windows(split_heads(mixer.kv(x), mixer.num_heads), block, halo_size)
    keys, values = windows.split((mixer.depth, mixer.value_depth), 2)
    index = offset_rows(block, block + 2 * halo_size, block + 2 * halo_size - 1, 0, x.device)
    rel_h, rel_w = mixer.pos_embed.height_rel[index], mixer.pos_embed.width_rel[index]
    content, position = window_logits(queries, keys, rel_h, rel_w)
    logits = content * mixer.depth**-0.5 + position
    if mixer.border == "mask":
        inside = split_windows(x.new_ones(1, 1, 1, *x.shape[2:]), block, halo_size)
        logits = logits.masked_fill(inside[:, :, 0, :, :, None, None] == 0, float("-inf"))
    return queries, values, logits
