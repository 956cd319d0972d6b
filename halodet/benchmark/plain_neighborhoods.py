"""Straightforward forms of mixers that sum over a neighborhood of each pixel, or over a fixed memory."""

from __future__ import annotations

from halodet.mixers.csa import CsaMixer
from halodet.mixers.elsa import ElsaMixer
from halodet.mixers.external import ExternalMixer
from halodet.mixers.key_only import KeyOnlyMixer
from halodet.mixers.lambda_layer import LambdaMixer
from halodet.mixers.neighborhood import NeighborhoodMixer
from halodet.mixers.slide import SlideMixer

import torch
import torch.nn.functional as F
from torch import Tensor


def csa(mixer: CsaMixer, x: Tensor) -> Tensor:
    """Unfold all patches, project each tap, mix the taps and fold the patches."""
    (height, width), heads = x.shape[-2:], mixer.num_heads
    logits = mixer.logits(F.avg_pool2d(x, 2, 2, ceil_mode=True)) * (mixer.out_channels // heads) ** -0.5
    weights = logits.flatten(2).unflatten(1, (heads, 9, 9)).softmax(3)
    patches = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (-1, 9))
    values = torch.einsum("bctn,oct->botn", patches, mixer.values.flatten(2)).unflatten(1, (heads, -1))
    mixed = torch.einsum("bhijn,bhdjn->bhdin", weights, values)
    return F.fold(mixed.flatten(1, 3), (height, width), 3, padding=1, stride=2)


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


def key_only(mixer: KeyOnlyMixer, x: Tensor) -> Tensor:
    """Unfold logits and values, with a softmax for each neighborhood."""
    keys, values = mixer.kv(x).split((mixer.kv.in_channels, mixer.out_channels), 1)
    heads = split_heads(values, mixer.num_heads)
    logits = torch.einsum("bndyx,nd->bnyx", split_heads(keys, mixer.num_heads), mixer.saliency)
    logits = logits * mixer.saliency.shape[1] ** -0.5
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
    rows, row_offsets = neighbors(x.shape[2], mixer.kernel_size, mixer.dilation, x.device)
    columns, column_offsets = neighbors(x.shape[3], mixer.kernel_size, mixer.dilation, x.device)
    near = (..., rows[:, None, :, None], columns[None, :, None, :])  # (B, heads, d, H, W, k, k)
    bias = mixer.bias[..., row_offsets[:, None, :, None], column_offsets[None, :, None, :]]
    logits = torch.einsum("bndyx,bndyxij->bnyxij", q * q.shape[2] ** -0.5, k[near]) + bias
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, logits.shape[-2:])
    return torch.einsum("bnyxij,bndyxij->bndyx", weights, v[near]).flatten(1, 2)


def slide(mixer: SlideMixer, x: Tensor) -> Tensor:
    """Gather all keys and values with the depthwise convolution."""
    depth, taps = mixer.out_channels // mixer.num_heads, mixer.kernel_size**2
    q, k, v = mixer.qkv(x).reshape(-1, 3 * depth, *x.shape[2:]).split(depth, 1)
    kernel, bias = mixer.merged_kernel().flatten(0, 1).unsqueeze(1), mixer.gather_bias.flatten()
    keys, values = (
        F.conv2d(part, kernel, bias, padding=mixer.kernel_size // 2, groups=depth).unflatten(1, (depth, taps))
        for part in (k, v)
    )
    position = mixer.position_bias.repeat(x.shape[0], 1)[..., None, None]
    if mixer.bias_on == "keys":
        keys = keys + position.unsqueeze(1)
    logits = torch.einsum("ndyx,ndtyx->ntyx", q * depth**-0.5, keys)
    weights = (logits if mixer.bias_on == "keys" else logits + position).softmax(1)
    return torch.einsum("ntyx,ndtyx->ndyx", weights, values).reshape(x.shape[0], -1, *x.shape[2:])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, C, H, W) -> (B, heads, C / heads, H, W)."""
    return x.unflatten(1, (heads, -1))


def neighbors(size: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the neighborhood of each place on a line, and the row of the bias table for each neighbor.

    Args:
        size: number of places.
        kernel_size: number of neighbors, odd; fewer on a line with fewer places.
        dilation: distance of neighbors; smaller on a line of fewer than ``kernel_size * dilation`` places.
        device: device of the result.

    Returns:
        Places (size, k) and rows (size, k), where row ``kernel_size - 1`` is that of the place itself.
    """
    dilation = max(1, min(dilation, size // kernel_size))
    count = min(kernel_size, size)
    place = torch.arange(size, device=device)
    remainder, index = place % dilation, place // dilation
    last = (size - 1 - remainder) // dilation + 1 - count  # first index of the last neighborhood
    first = torch.minimum((index - kernel_size // 2).clamp(min=0), last)
    indices = first[:, None] + torch.arange(count, device=device)
    return indices * dilation + remainder[:, None], indices - index[:, None] + kernel_size - 1


def unfold(x: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """(B, C, H, W) -> (B, C, taps, H, W), the neighborhood of each pixel, with zeros outside the map."""
    padding = dilation * (kernel_size // 2)
    return F.unfold(x, kernel_size, dilation, padding).view(x.shape[0], x.shape[1], -1, *x.shape[2:])
