"""Halo attention layers to compare: ours and those a user could take instead, each with its projections and on the same input."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from halodet.mixers.halo import HaloMixer

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Contender -> the package it needs.
CONTENDERS = {
    "halodet": "halodet",
    "timm": "timm",
    "halonet-pytorch": "halonet_pytorch",
    "flex-attention": "torch.nn.attention",
}
# Block and halo -> who uses them.
BLOCKS = {
    (8, 3): "H0 H1 H2, halonet50ts",
    (10, 3): "H3 H7",
    (12, 2): "H4",
    (14, 2): "H5",
    (8, 4): "H6",
    (8, 2): "halonet26t",
    (7, 2): "haloregnetz_b",
}
CHANNELS = {8: 128, 16: 256, 32: 512}  # by stride, as in ResNet-50


@dataclass(frozen=True)
class Setting:
    """One layer on one map; 8 heads, as timm has them, and as many channels out as in."""

    batch: int
    channels: int
    height: int
    width: int
    block: int
    halo: int
    heads: int = 8

    def __str__(self) -> str:
        return f"{self.batch}×{self.channels}×{self.height}×{self.width} b{self.block} h{self.halo}"

    def work(self, element_size: int, *, train: bool) -> tuple[float, float]:
        """Operations and bytes that cannot be left out: projections and attention read and write every map once, and no score is ever
        written; training does all of it three times, and what is recomputed does not count."""
        pixels = self.height * self.width
        window = self.block + 2 * self.halo
        pairs = pixels * window**2
        forward = (
            2 * 3 * self.channels**2 * pixels + 2 * 2 * self.channels * pairs + 2 * 2 * window * self.channels * pixels
        )
        moved = 8 * self.channels * pixels * element_size  # x, q, k, v; q, k, v again; the result
        return self.batch * forward * (3 if train else 1), self.batch * moved * (3 if train else 1)


def settings(
    sizes: list[tuple[int, int]], strides: list[int], batches: list[int], blocks: list[tuple[int, int]]
) -> list[Setting]:
    """Every combination, on maps of images padded to a multiple of 32 pixels as an FPN wants them."""
    return [
        Setting(batch, CHANNELS[stride], -(-height // 32) * 32 // stride, -(-width // 32) * 32 // stride, block, halo)
        for batch in batches
        for height, width in sizes
        for stride in strides
        for block, halo in blocks
    ]


def available(name: str) -> bool:
    """Whether a contender's package is installed."""
    return importlib.util.find_spec(CONTENDERS[name].split(".")[0]) is not None


class _ToBlocks(nn.Module):
    """Pads a map to whole blocks for a layer that takes no other, and cuts the result."""

    def __init__(self, layer: nn.Module, block: int) -> None:
        super().__init__()
        self.layer, self.block = layer, block

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        bottom, right = -height % self.block, -width % self.block
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return self.layer(x)[..., :height, :width]


@cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class _Flex(HaloMixer):
    """The same layer through FlexAttention: windows gathered, relative logits added by a score function."""

    def forward(self, x: Tensor) -> Tensor:
        block, halo, window = self.block_size, self.halo_size, self.block_size + 2 * self.halo_size
        (batch, _, height, width), heads = x.shape, self.num_heads
        rows, columns = -(-height // block), -(-width // block)
        x = F.pad(x, (0, columns * block - width, 0, rows * block - height))
        q = self.q(x).view(batch, heads, self.depth, rows, block, columns, block)
        q = q.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, heads, block**2, self.depth)
        kv = F.pad(self.kv(x), (halo,) * 4).unfold(2, window, block).unfold(3, window, block)
        kv = kv.permute(0, 2, 3, 1, 4, 5).reshape(len(q), heads, -1, window**2).transpose(2, 3)
        k, v = kv.split((self.depth, self.value_depth), -1)
        index = window - 1 + torch.arange(window, device=x.device) - torch.arange(block, device=x.device).unsqueeze(1)
        queries = q.unflatten(2, (block, block))
        along_h = torch.einsum("nhijd,iwd->nhijw", queries, self.pos_embed.height_rel[index]).flatten(2, 3)
        along_w = torch.einsum("nhijd,jwd->nhijw", queries, self.pos_embed.width_rel[index]).flatten(2, 3)

        def add_position(score: Tensor, n: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + along_h[n, head, i, j // window] + along_w[n, head, i, j % window]

        out = _flex_attention()(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=add_position)
        out = out.view(batch, rows, columns, heads, block, block, -1).permute(0, 3, 6, 1, 4, 2, 5)
        return out.reshape(batch, -1, rows * block, columns * block)[..., :height, :width]


def build_layer(name: str, setting: Setting, border: str, backend: str = "auto") -> nn.Module:
    """The layer of a contender; ``border`` and ``backend`` are ours to choose, timm and FlexAttention have zeros, halonet-pytorch masks."""
    common = {"num_heads": setting.heads, "block_size": setting.block, "halo_size": setting.halo}
    if name == "halodet":
        return HaloMixer(setting.channels, setting.channels, **common, border=border, backend=backend)
    if name == "timm":
        from timm.layers.halo_attn import HaloAttn

        return _ToBlocks(HaloAttn(setting.channels, **common), setting.block)
    if name == "halonet-pytorch":
        from halonet_pytorch import HaloAttention

        depth = setting.channels // setting.heads
        layer = HaloAttention(
            dim=setting.channels, block_size=setting.block, halo_size=setting.halo, dim_head=depth, heads=setting.heads
        )
        layer.to_out = nn.Identity()  # the others have no output projection
        return _ToBlocks(layer, setting.block)
    return _Flex(setting.channels, setting.channels, **common, border="zero")


def build_call(
    name: str, setting: Setting, mode: str, border: str, backend: str, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A call without arguments that runs a contender once: ``mode`` is ``"forward"`` or ``"training"`` (forward and backward)."""
    generator = torch.Generator().manual_seed(0)
    layer = build_layer(name, setting, border, backend).to(device, dtype)
    x, grad = (
        torch.randn(setting.batch, setting.channels, setting.height, setting.width, generator=generator)
        for _ in range(2)
    )
    x, grad = x.to(device, dtype), grad.to(device, dtype)
    return partial(_forward, layer, x) if mode == "forward" else partial(_train, layer, x.requires_grad_(), grad)


@torch.no_grad()
def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _train(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    x.grad = None
    layer.zero_grad()
    out = layer(x)
    out.backward(grad)
    return out
