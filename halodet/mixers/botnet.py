from __future__ import annotations

from halodet.attention import halo_attention
from halodet.mixers.halo import check_attention
from halodet.mixers.registry import MixerSpec, register_mixer

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = ("interpolate", "offset")


class RelativePosition(nn.Module):
    """The tables of a (height, width) map: (2 * height - 1, d_qk) and (2 * width - 1, d_qk), shared by the heads."""

    def __init__(self, height: int, width: int, depth: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * height - 1, depth))
        self.width_rel = nn.Parameter(torch.empty(2 * width - 1, depth))


@register_mixer("bottleneck")
class BoTNetMixer(nn.Module):
    """Global self-attention of a bottleneck transformer, for maps of any size: every pixel attends to every other one.

    Its two relative position tables are those of the map it was trained on. On another map a table is read at other places: stretched over
    the map's offsets (``"interpolate"``: the ends of the table stand for the map's ends, entries between are linear), or at the true offset
    in pixels (``"offset"``: offsets beyond the table take its end). On a map of the table's own size both are the table itself.

    Time and memory for scores go with the square of the map's pixels, and zeros that pad a batch are attended to like any other pixel. With
    ``window``, the map is cut into windows of that many pixels a side, each of which attends to itself only.

    Parameter names and the order of channels in ``qkv`` (queries of all heads, keys, values) are those of timm's ``BottleneckAttn``.

    Args:
        channels: of the input.
        value_channels: of the values over all heads, and so of the output.
        table_size: (height, width) in pixels of the map that the tables are made for.
        stride: 1, or 2: the output is then averaged over 2×2 pixels.
        num_heads: heads; divides the channels of queries and of values.
        window: pixels along a side of a window; 0 for the whole map.
        position: ``"interpolate"`` or ``"offset"``.
        qk_channels: of queries and keys over all heads, by default those of the input.
        backend: of attention, see :func:`halodet.attention.halo_attention`.

    Raises:
        ValueError: the heads do not divide the channels, or table size, window, position or backend are not usable.

    Source: Srinivas et al., Bottleneck Transformers for Visual Recognition, CVPR 2021 (arXiv 2101.11605); layout as in timm.
    """

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        table_size: tuple[int, int],
        stride: int = 1,
        num_heads: int = 4,
        window: int = 0,
        position: str = "interpolate",
        qk_channels: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        qk_channels = channels if qk_channels is None else qk_channels
        check_attention(num_heads, qk_channels, value_channels, backend)
        if min(table_size) < 1 or window < 0 or position not in POSITIONS:
            raise ValueError(
                f"table_size is {table_size}, window {window} and position {position!r}, expected a table for a map of 1 pixel or more, "
                f"a window of 1 pixel or more (0 for the whole map) and a position of {POSITIONS}"
            )
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.window, self.position, self.backend = window, position, backend
        self.qk_channels, self.depth = qk_channels, qk_channels // num_heads
        self.qkv = nn.Conv2d(channels, 2 * qk_channels + value_channels, 1, bias=False)
        self.pos_embed = RelativePosition(*table_size, self.depth)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> BoTNetMixer:
        return cls(
            spec.channels,
            spec.value_channels,
            table_size=(spec.block_size, spec.block_size),
            stride=spec.stride,
            num_heads=spec.num_heads,
            backend=spec.backend,
        )

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        nn.init.trunc_normal_(self.pos_embed.height_rel, std=self.depth**-0.5)
        nn.init.trunc_normal_(self.pos_embed.width_rel, std=self.depth**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ⌈H/stride⌉, ⌈W/stride⌉), with channels last in memory."""
        x = x.contiguous(memory_format=torch.channels_last)
        maps = [
            F.conv2d(x, weight)
            for weight in self.qkv.weight.split((self.qk_channels, self.qk_channels, self.out_channels))
        ]
        height, width = x.shape[-2:]
        # Attention over a block without a halo is attention over the whole of it.
        block = self.window or max(height, width)
        if x.is_cuda and not self.window:
            block = -(-block // 16) * 16  # kernels are compiled for a block size: not for each size of image anew
        sides = (block, block) if self.window else (height, width)
        tables = (self.pos_embed.height_rel, self.pos_embed.width_rel)
        out = halo_attention(
            *(y.view(y.shape[0], self.num_heads, -1, height, width) for y in maps),
            *(interpolate_rel_pos(table, side, block, self.position) for table, side in zip(tables, sides, strict=True)),
            block_size=block, halo_size=0, border="mask", backend=self.backend,
        ).flatten(1, 2)  # fmt: skip
        # ceil_mode averages only the pixels there are, so that an odd map gives ⌈H/2⌉ like every other mixer.
        return F.avg_pool2d(out, 2, 2, ceil_mode=True) if self.stride == 2 else out

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, window={self.window or 'whole map'}, position={self.position!r}, stride={self.stride}"


def interpolate_rel_pos(table: Tensor, side: int, block: int, position: str) -> Tensor:
    """A relative position table (2 * trained - 1, d), read for a map ``side`` pixels long, as rows for offsets -(block - 1) … block - 1."""
    last = (table.shape[0] - 1) // 2  # the offset of the table's end
    if side == block == last + 1:
        return table
    # places in half precision would be off by whole rows
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    offsets = torch.arange(1 - block, block, device=table.device, dtype=dtype)
    if position == "interpolate" and side > 1:
        offsets = offsets * (last / (side - 1))
    place = (offsets + last).clamp(0, 2 * last)
    below = place.floor()
    share = (place - below).to(table.dtype)[:, None]
    below = below.long()
    return table[below] * (1 - share) + table[(below + 1).clamp(max=2 * last)] * share
