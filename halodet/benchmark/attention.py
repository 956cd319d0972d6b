"""Halo attention layers to compare: halodet's and alternatives, each with its projections and on the same input."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from halodet.mixers.halo import HaloMixer

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Implementation -> package that it needs.
IMPLEMENTATIONS = {
    "halodet": "halodet",
    "timm": "timm",
    "halonet-pytorch": "halonet_pytorch",
    "flex-attention": "torch.nn.attention",
}
# Block and halo size -> networks that use them.
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
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """Size of one layer and its input; the layer has as many output as input channels."""

    batch: int
    channels: int
    height: int
    width: int
    block: int
    halo: int
    heads: int = 8

    def __str__(self) -> str:
        return f"{self.batch}×{self.channels}×{self.height}×{self.width} b{self.block} h{self.halo}"


def make_cases(
    sizes: list[tuple[int, int]], strides: list[int], batches: list[int], blocks: list[tuple[int, int]]
) -> list[Case]:
    """Return all combinations, for images padded to a multiple of 32 pixels as an FPN needs them."""
    return [
        Case(batch, CHANNELS[stride], -(-height // 32) * 32 // stride, -(-width // 32) * 32 // stride, block, halo)
        for batch in batches
        for height, width in sizes
        for stride in strides
        for block, halo in blocks
    ]


def is_installed(name: str) -> bool:
    """Return whether the package of an implementation is installed."""
    return importlib.util.find_spec(IMPLEMENTATIONS[name].split(".")[0]) is not None


class _PadToBlocks(nn.Module):
    """Pad the input of a layer that requires a multiple of the block size, and crop its output."""

    def __init__(self, layer: nn.Module, block: int) -> None:
        super().__init__()
        self.layer, self.block = layer, block

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        bottom, right = -height % self.block, -width % self.block
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return self.layer(x)[..., :height, :width]


def _fused_flex_attention(*arguments: Tensor, score_mod: Callable[..., Tensor]) -> Tensor:
    # Dynamo runs what it does not compile, for example beyond its recompile limit, as plain Python.
    if not torch.compiler.is_compiling():
        raise RuntimeError("FlexAttention ran without torch.compile: its time would be that of the unfused computation")
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(*arguments, score_mod=score_mod)


@cache
def _flex_attention() -> Callable[..., Tensor]:
    return torch.compile(_fused_flex_attention, dynamic=False, fullgraph=True)


def _reset_compiler() -> None:
    """Drop all compiled functions: each setting is one more recompilation, and their number is limited."""
    torch._dynamo.reset()
    _flex_attention.cache_clear()


class _Flex(HaloMixer):
    """The same layer with FlexAttention: gathered windows, relative logits in a score_mod."""

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

        try:
            out = _flex_attention()(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=add_position)
        except Exception as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            # Dynamo's first line is general; the cause follows this label.
            cause = str(error).rpartition("Developer debug context:")[2].partition("For more details")[0]
            raise RuntimeError(f"FlexAttention was not compiled: {' '.join(cause.split())[:300]}") from error
        out = out.view(batch, rows, columns, heads, block, block, -1).permute(0, 3, 6, 1, 4, 2, 5)
        return out.reshape(batch, -1, rows * block, columns * block)[..., :height, :width]


def build_layer(name: str, case: Case, border: str, backend: str = "auto") -> nn.Module:
    """Build the layer of an implementation.

    ``border`` and ``backend`` apply to halodet; timm and FlexAttention use zeros, halonet-pytorch masks.
    """
    common = {"num_heads": case.heads, "block_size": case.block, "halo_size": case.halo}
    if name == "halodet":
        return HaloMixer(case.channels, case.channels, **common, border=border, backend=backend)
    if name == "timm":
        from timm.layers.halo_attn import HaloAttn

        return _PadToBlocks(HaloAttn(case.channels, **common), case.block)
    if name == "halonet-pytorch":
        from halonet_pytorch import HaloAttention

        sizes = {"block_size": case.block, "halo_size": case.halo, "heads": case.heads}
        layer = HaloAttention(dim=case.channels, dim_head=case.channels // case.heads, **sizes)
        layer.to_out = nn.Identity()  # the others have no output projection
        return _PadToBlocks(layer, case.block)
    return _Flex(case.channels, case.channels, **common, border="zero")


def build_call(
    name: str, case: Case, mode: str, border: str, backend: str, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Return a call that runs an implementation once; ``mode`` is one of :data:`MODES`."""
    if name == "flex-attention":
        _reset_compiler()
    generator = torch.Generator().manual_seed(0)
    layer = build_layer(name, case, border, backend).to(device, dtype)
    size = (case.batch, case.channels, case.height, case.width)
    x, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
    return call_layer(layer, x, grad, mode)


def call_layer(layer: nn.Module, x: Tensor, grad: Tensor, mode: str) -> Callable[[], Tensor]:
    """Return a call of a layer, in the mode ``"forward+backward"`` also of its backward with ``grad``."""
    return partial(_forward, layer, x) if mode == "forward" else partial(_train, layer, x.requires_grad_(), grad)


@torch.no_grad()
def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _train(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    out = layer(x)
    out.backward(grad)
    # Gradients that exist before a call would not count in its peak memory.
    x.grad = None
    layer.zero_grad()
    return out
