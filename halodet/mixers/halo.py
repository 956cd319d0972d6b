from __future__ import annotations

from halodet.attention import BACKENDS, BORDERS, halo_attention
from halodet.mixers.registry import MixerSpec, register_mixer

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativePosition(nn.Module):
    """The two relative position tables of a halo attention layer, (2 * window - 1, d_qk) each, shared by its heads."""

    def __init__(self, window: int, depth: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, depth))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, depth))


@register_mixer("halo")
class HaloMixer(nn.Module):
    """Blocked local self-attention with a halo, without bias and without an output projection.

    Parameter names, and the order of channels in ``kv`` (keys, then values, inside each head), are those of timm's ``HaloAttn``, so that
    its weights load unchanged.

    Args:
        channels: of the input.
        value_channels: of the values over all heads, and so of the output.
        stride: 1 or 2. With 2, every second query in each direction is kept; where no block of even size allows that, the output of
            stride 1 is averaged over 2×2 pixels.
        num_heads: heads; divides the channels of queries and of values.
        block_size: pixels along a side of a block.
        halo_size: pixels around a block.
        border: ``"zero"`` or ``"mask"``, see :func:`halodet.attention.halo_attention`.
        qk_channels: of queries and keys over all heads, by default those of the input.
        backend: of attention, see there.

    Raises:
        ValueError: the heads do not divide the channels, or block, halo, border or backend are not usable.

    Source: Vaswani et al., CVPR 2021 (arXiv 2103.12731); initialisation and layout as in timm.
    """

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        border: str = "mask",
        qk_channels: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        qk_channels = channels if qk_channels is None else qk_channels
        if block_size < 1 or halo_size < 0 or border not in BORDERS:
            raise ValueError(
                f"block_size is {block_size}, halo_size {halo_size} and border {border!r}, "
                f"expected a block of 1 pixel or more, a halo of 0 or more and a border of {BORDERS}"
            )
        check_attention(num_heads, qk_channels, value_channels, backend)
        self.out_channels = value_channels
        self.num_heads, self.block_size, self.halo_size, self.border, self.backend = (
            num_heads,
            block_size,
            halo_size,
            border,
            backend,
        )
        self.pool = stride > 1 and block_size % stride != 0
        self.query_stride = 1 if self.pool else stride
        self.depth, self.value_depth = qk_channels // num_heads, value_channels // num_heads
        self.q = nn.Conv2d(channels, qk_channels, 1, stride=self.query_stride, bias=False)
        self.kv = nn.Conv2d(channels, qk_channels + value_channels, 1, bias=False)
        self.pos_embed = RelativePosition(block_size + 2 * halo_size, self.depth)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> HaloMixer:
        return cls(
            spec.channels,
            spec.value_channels,
            stride=spec.stride,
            num_heads=spec.num_heads,
            block_size=spec.block_size,
            halo_size=spec.halo_size,
            border=spec.border,
            backend=spec.backend,
        )

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.q.weight, std=self.q.in_channels**-0.5)
        nn.init.trunc_normal_(self.kv.weight, std=self.kv.in_channels**-0.5)
        nn.init.trunc_normal_(self.pos_embed.height_rel, std=self.depth**-0.5)
        nn.init.trunc_normal_(self.pos_embed.width_rel, std=self.depth**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ⌈H/stride⌉, ⌈W/stride⌉), with channels last in memory."""
        # Attention wants channels last, and so do 1×1 convolutions. Keys and values are projected apart because cutting one map of both in
        # two would copy their gradients into one again.
        x = x.contiguous(memory_format=torch.channels_last)
        weights = self.kv.weight.unflatten(0, (self.num_heads, -1)).split((self.depth, self.value_depth), dim=1)
        maps = (self.q(x), *(F.conv2d(x, weight.flatten(0, 1)) for weight in weights))
        out = halo_attention(
            *(y.view(y.shape[0], self.num_heads, -1, *y.shape[2:]) for y in maps), self.pos_embed.height_rel, self.pos_embed.width_rel,
            block_size=self.block_size, halo_size=self.halo_size, border=self.border, stride=self.query_stride, backend=self.backend,
        ).flatten(1, 2)  # fmt: skip
        if self.pool:
            # ceil_mode averages only the pixels there are, so that an odd map gives ⌈H/2⌉ like every other mixer.
            out = F.avg_pool2d(out, 2, 2, ceil_mode=True)
        return out

    def extra_repr(self) -> str:
        stride = 2 if self.pool else self.query_stride
        return f"heads={self.num_heads}, block={self.block_size}, halo={self.halo_size}, border={self.border!r}, stride={stride}"


def check_attention(num_heads: int, qk_channels: int, value_channels: int, backend: str) -> None:
    """ValueError where heads do not divide the channels, or there is no such backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"the attention backend is {backend!r}, expected 'auto' or one of {sorted(BACKENDS)}")
    if num_heads < 1 or qk_channels % num_heads or value_channels % num_heads:
        raise ValueError(
            f"{num_heads} heads do not divide {qk_channels} channels of queries and {value_channels} of values"
        )
