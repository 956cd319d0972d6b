"""Straightforward forms of the mixers, as their papers write them, with the weights of a mixer.

Each function takes a mixer of stride 1 and a map (B, C, H, W), and returns what the mixer returns. The work is in
matrix products, convolutions and ``einsum``, so that a counter of these counts the multiply-adds of the definition.
"""

from __future__ import annotations

from collections.abc import Callable

from halodet.mixers.blockwise import BlockwiseMixer
from halodet.mixers.botnet import BoTNetMixer, interpolate_rel_pos
from halodet.mixers.conv import ConvMixer
from halodet.mixers.elsa import ElsaMixer
from halodet.mixers.external import ExternalMixer
from halodet.mixers.halo import HaloMixer
from halodet.mixers.key_only import KeyOnlyMixer
from halodet.mixers.lambda_layer import LambdaMixer
from halodet.mixers.neighborhood import NeighborhoodMixer
from halodet.mixers.registry import Mixer

import torch
import torch.nn.functional as F
from torch import Tensor


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
    along_h = torch.einsum("bndyx,yid->bnyxi", q, rel_h[offsets(height, height, x.device)])
    along_w = torch.einsum("bndyx,xjd->bnyxj", q, rel_w[offsets(width, width, x.device)])
    logits = torch.einsum("bndyx,bndij->bnyxij", q * mixer.depth**-0.5, k)
    weights = (logits + along_h.unsqueeze(-1) + along_w.unsqueeze(-2)).flatten(-2).softmax(-1)
    return torch.einsum("bnyxj,bndj->bndyx", weights, v.flatten(3)).flatten(1, 2)


def elsa(mixer: ElsaMixer, x: Tensor) -> Tensor:
    """Unfold the values and multiply them with a filter per channel and pixel."""
    q, k, v = mixer.qkv(x).split((mixer.qk_channels, mixer.qk_channels, mixer.out_channels), 1)
    logits = mixer.logits(F.gelu(mixer.products(q * k)))
    weights = logits.unflatten(1, (mixer.num_heads, -1)).softmax(2)
    filters = weights.repeat_interleave(mixer.out_channels // mixer.num_heads, 1)
    if mixer.ghost_multiply is not None:
        filters = filters * mixer.ghost_multiply[..., None, None]
    if mixer.ghost_add is not None:
        filters = filters + mixer.ghost_add[..., None, None]
    return torch.einsum("bctyx,bctyx->bcyx", filters, unfold(v, mixer.kernel_size, mixer.dilation))


def external(mixer: ExternalMixer, x: Tensor) -> Tensor:
    """Read the memory with two 1x1 convolutions."""
    attention, x = mixer.attention, mixer.conv(x)
    logits = F.conv2d(attention.proj_in(x), attention.memory_k[..., None, None])
    weights = logits.flatten(2).softmax(-1).view_as(logits)
    weights = weights / (1e-9 + weights.sum(1, keepdim=True))
    return x + attention.norm(attention.proj_out(F.conv2d(weights, attention.memory_v.t()[..., None, None])))


def halo(mixer: HaloMixer, x: Tensor) -> Tensor:
    """Unfold all windows, as timm does, and mask the pixels outside the map."""
    (height, width), block, halo_size = x.shape[-2:], mixer.block_size, mixer.halo_size
    queries = split_blocks(split_heads(mixer.q(x), mixer.num_heads), block)
    windows = split_windows(split_heads(mixer.kv(x), mixer.num_heads), block, halo_size)
    keys, values = windows.split((mixer.depth, mixer.value_depth), 2)
    logits = window_logits(queries, keys, mixer.pos_embed.height_rel, mixer.pos_embed.width_rel, mixer.depth**-0.5)
    if mixer.border == "mask":
        inside = split_windows(x.new_ones(1, 1, 1, height, width), block, halo_size)
        logits = logits.masked_fill(inside[:, :, 0, :, :, None, None] == 0, float("-inf"))
    weights = logits.flatten(-2).softmax(-1)
    out = torch.einsum("bnrcijw,bndrcw->bndrcij", weights, values.flatten(-2))
    return join_blocks(out, height, width).flatten(1, 2)


def key_only(mixer: KeyOnlyMixer, x: Tensor) -> Tensor:
    """Unfold logits and values, with a softmax for each neighbourhood."""
    keys, values = mixer.kv(x).split((mixer.kv.in_channels, mixer.out_channels), 1)
    heads = split_heads(values, mixer.num_heads)
    logits = torch.einsum("bndyx,nd->bnyx", split_heads(keys, mixer.num_heads), mixer.saliency)
    logits = logits * mixer.saliency.shape[1] ** -0.5 + mixer.saliency_bias.view(-1, 1, 1)
    parts = []
    if mixer.scope != "global":
        inside = unfold(torch.ones_like(logits[:, :1]), mixer.kernel_size) != 0
        near = unfold(logits, mixer.kernel_size).masked_fill(~inside, float("-inf"))
        unfolded = unfold(values, mixer.kernel_size).unflatten(1, (mixer.num_heads, -1))
        parts.append(torch.einsum("bntyx,bndtyx->bndyx", near.softmax(2), unfolded))
    if mixer.scope != "local":
        mean = torch.einsum("bnj,bndj->bnd", logits.flatten(2).softmax(-1), heads.flatten(3))
        parts.append(mean[..., None, None].expand_as(heads))
    if mixer.share is not None:
        share = mixer.share.sigmoid().view(-1, 1, 1, 1)
        parts = [share * parts[0] + (1 - share) * parts[1]]
    out = parts[0].flatten(1, 2)
    if mixer.gate == "value":
        out = out * values
    return out if mixer.gate_proj is None else out * mixer.gate_proj(x).sigmoid()


def lambda_layer(mixer: LambdaMixer, x: Tensor) -> Tensor:
    """Convolve all values with each filter, as timm does: key_channels numbers per value."""
    sizes = (mixer.num_heads * mixer.key_channels, mixer.key_channels, mixer.depth)
    q, k, v = mixer.qkv(x).split(sizes, 1)
    q, v = split_heads(mixer.norm_q(q), mixer.num_heads), mixer.norm_v(v)
    content = torch.einsum("bkn,bvn->bkv", k.flatten(2).softmax(-1), v.flatten(2))
    position = mixer.conv_lambda(v.permute(0, 2, 3, 1).unsqueeze(1))
    out = torch.einsum("bhkyx,bkv->bhvyx", q, content) + torch.einsum("bhkyx,bkyxv->bhvyx", q, position)
    return out.flatten(1, 2)


def neighborhood(mixer: NeighborhoodMixer, x: Tensor) -> Tensor:
    """Gather all keys and values of each pixel."""
    parts = mixer.qkv(x).split((mixer.channels, mixer.channels, mixer.out_channels), 1)
    q, k, v = (split_heads(part, mixer.num_heads) for part in parts)
    rows, row_offsets = neighbours(x.shape[2], mixer.kernel_size, mixer.dilation, x.device)
    columns, column_offsets = neighbours(x.shape[3], mixer.kernel_size, mixer.dilation, x.device)
    near = (..., rows[:, None, :, None], columns[None, :, None, :])  # (B, heads, d, H, W, k, k)
    bias = mixer.bias[..., row_offsets[:, None, :, None], column_offsets[None, :, None, :]]
    logits = torch.einsum("bndyx,bndyxij->bnyxij", q * q.shape[2] ** -0.5, k[near]) + bias
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])
    return torch.einsum("bnyxij,bndyxij->bndyx", weights, v[near]).flatten(1, 2)


def neighbours(size: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the neighbourhood of each place on a line, and the row of the bias table for each neighbour.

    Args:
        size: number of places.
        kernel_size: number of neighbours, odd; fewer on a line with fewer places.
        dilation: distance of neighbours; smaller on a line of fewer than ``kernel_size * dilation`` places.
        device: device of the result.

    Returns:
        Places (size, k) and rows (size, k), where row ``kernel_size - 1`` is that of the place itself.
    """
    dilation = max(1, min(dilation, size // kernel_size))
    count = min(kernel_size, size)
    place = torch.arange(size, device=device)
    remainder, index = place % dilation, place // dilation
    last = (size - 1 - remainder) // dilation + 1 - count  # first index of the last neighbourhood
    first = torch.minimum((index - kernel_size // 2).clamp(min=0), last)
    indices = first[:, None] + torch.arange(count, device=device)
    return indices * dilation + remainder[:, None], indices - index[:, None] + kernel_size - 1


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, C, H, W) -> (B, heads, C / heads, H, W)."""
    return x.unflatten(1, (heads, -1))


def unfold(x: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, C, taps, H, W), the neighbourhood of each pixel, with zeros outside the map."""
    padding = dilation * (kernel_size // 2)
    return F.unfold(x, kernel_size, dilation, padding).view(x.shape[0], x.shape[1], -1, *x.shape[2:])


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


def offsets(queries: int, window: int, device: torch.device) -> Tensor:
    """Return the row of a relative position table for each query and key of one direction (queries, window)."""
    return window - 1 + torch.arange(window, device=device) - torch.arange(queries, device=device).unsqueeze(1)


def window_logits(queries: Tensor, keys: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    """Compute (B, heads, rows, columns, block, block, window, window) from the results of the two functions above."""
    block, window = queries.shape[-1], keys.shape[-1]
    index = offsets(block, window, queries.device)
    along_h = torch.einsum("bndrcij,iwd->bnrcijw", queries, rel_h[index])
    along_w = torch.einsum("bndrcij,jwd->bnrcijw", queries, rel_w[index])
    logits = torch.einsum("bndrcij,bndrcuw->bnrcijuw", queries * scale, keys)
    return logits + along_h.unsqueeze(-1) + along_w.unsqueeze(-2)


PLAIN_OPERATORS: dict[type[Mixer], Callable[..., Tensor]] = {
    BlockwiseMixer: blockwise,
    BoTNetMixer: botnet,
    ConvMixer: lambda mixer, x: mixer.conv(x),
    ElsaMixer: elsa,
    ExternalMixer: external,
    HaloMixer: halo,
    KeyOnlyMixer: key_only,
    LambdaMixer: lambda_layer,
    NeighborhoodMixer: neighborhood,
}
