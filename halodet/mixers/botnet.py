"""Global self-attention of a bottleneck transformer."""

from __future__ import annotations

from halodet.attention import halo_attention
from halodet.mixers.checks import check_backend, check_choice, check_heads, check_integer
from halodet.mixers.halo import RelativePosition, average_2x2
from halodet.mixers.memory import warn_memory
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.utils.exporting import channels_last, is_exporting

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = ("interpolate", "offset")


@register_mixer("botnet")
class BoTNetMixer(Mixer):
    """Global self-attention of a bottleneck transformer, for feature maps of any size.

    The relative position tables have the size of the feature map they were trained on. On a map of another size they
    are read by linear interpolation: with ``"interpolate"`` the ends of a table correspond to the ends of the map, with
    ``"offset"`` a row corresponds to an offset in pixels and offsets beyond the table use its last row. On a map of the
    table's own size both return the table itself.

    Time and memory grow with the square of the number of pixels, and padding of a batch takes part in attention. With
    ``window > 0`` the map is split into windows of that size, and attention stays within a window.

    Parameter names and the order of channels in ``qkv`` (queries of all heads, keys, values) are those of timm's
    ``BottleneckAttn``.

    Args:
        channels: number of input channels.
        value_channels: number of channels of the values over all heads, which is the number of output channels.
        table_size: (height, width) in pixels of the feature map that the tables are made for.
        stride: 1, or 2 to average the output over 2x2 pixels.
        num_heads: number of heads; divides the channels of queries and of values.
        window: side of a window in pixels; 0 for the whole map.
        position: ``"interpolate"`` or ``"offset"``.
        qk_channels: number of channels of queries and keys over all heads; defaults to ``channels``.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.

    Options (``MODEL.HALONET.MIXER_OPTIONS.botnet``): ``table_size`` (defaults to the block size), ``window``,
    ``position``.

    Raises:
        ValueError: the heads do not divide the channels, or a size, position or backend is invalid.

    Source: Srinivas et al., Bottleneck Transformers for Visual Recognition, CVPR 2021 (arXiv 2101.11605); layout as in
    timm.
    """

    is_attention = True
    rel_pos_tables = ("pos_embed.height_rel", "pos_embed.width_rel")

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
        check_heads(num_heads, qk_channels, value_channels)
        check_backend(backend)
        if len(table_size) != 2 or min(table_size) < 1:
            raise ValueError(f"table_size={table_size} is invalid: expected a height and width of at least 1 pixel")
        check_integer("window", window, 0)
        check_choice("position", position, POSITIONS)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.window, self.position, self.backend = window, position, backend
        self.qk_channels, self.depth = qk_channels, qk_channels // num_heads
        self.qkv = nn.Conv2d(channels, 2 * qk_channels + value_channels, 1, bias=False)
        self.pos_embed = RelativePosition(*table_size, self.depth)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> BoTNetMixer:
        options = spec.read_options(table_size=(spec.block_size,) * 2, window=0, position="interpolate")
        return cls(
            spec.channels,
            spec.value_channels,
            stride=spec.stride,
            num_heads=spec.num_heads,
            backend=spec.backend,
            **options,
        )

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        self.pos_embed.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride)), in channels last format."""
        x = channels_last(x)
        height, width = x.shape[-2:]
        weights = self.qkv.weight.split((self.qk_channels, self.qk_channels, self.out_channels))
        q, k, v = (F.conv2d(x, w).view(x.shape[0], self.num_heads, -1, height, width) for w in weights)
        if not self.window and (torch.jit.is_tracing() or is_exporting()):
            rel_h = interpolate_rel_pos(self.pos_embed.height_rel, height, height, self.position)
            rel_w = interpolate_rel_pos(self.pos_embed.width_rel, width, width, self.position)
            out = _attend_whole_map(q, k, v, rel_h, rel_w, self.depth**-0.5).flatten(1, 2)
            return average_2x2(out) if self.stride == 2 else out
        # A block as large as the map and without a halo makes blocked attention global.
        block = self.window or max(height, width)
        if x.is_cuda and not self.window:
            block = -(-block // 16) * 16  # kernels are compiled per block size: round up so that image sizes share them
        rel_h, rel_w = (
            interpolate_rel_pos(table, self.window or size, block, self.position)
            for table, size in ((self.pos_embed.height_rel, height), (self.pos_embed.width_rel, width))
        )
        if not self.window and not (x.is_cuda and self.backend in ("auto", "triton")):  # Triton attends in tiles
            unfolded = self.backend == "unfold"
            logits = self.num_heads * (q.shape[0] * block**4 if unfolded else (height * width) ** 2) * q.element_size()
            warn_memory("mixer botnet", (3 if unfolded else 2) * logits)  # the logits (of position), and the weights
        out = halo_attention(
            q, k, v, rel_h, rel_w, block_size=block, halo_size=0, border="mask", backend=self.backend
        ).flatten(1, 2)
        return average_2x2(out) if self.stride == 2 else out

    def extra_repr(self) -> str:
        window = self.window or "whole map"
        return f"heads={self.num_heads}, window={window}, position={self.position!r}, stride={self.stride}"


def _attend_whole_map(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    """Compute global attention without blocks, whose size would bind a traced or exported graph to a map size.

    Tensors as in :func:`halodet.attention.halo_attention`, for windows as large as the map.
    """
    (height, width), queries = q.shape[-2:], q.permute(0, 1, 3, 4, 2)
    y, x = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
    rel_h, rel_w = rel_h.to(q.dtype)[y - y.unsqueeze(1) + height - 1], rel_w.to(q.dtype)[x - x.unsqueeze(1) + width - 1]
    along_h, along_w = (
        torch.einsum("bnijd,ikd->bnijk", queries, rel_h),
        torch.einsum("bnijd,jkd->bnijk", queries, rel_w),
    )
    position = (along_h.unsqueeze(-1) + along_w.unsqueeze(-2)).flatten(-2).flatten(2, 3)
    scores = torch.matmul(queries.flatten(2, 3) * scale, k.flatten(3)) + position
    out = torch.matmul(v.flatten(3), scores.softmax(-1).to(v.dtype).transpose(-1, -2))
    return out.reshape(*v.shape[:3], height, width)


def interpolate_rel_pos(table: Tensor, size: int, block: int, position: str) -> Tensor:
    """Read a relative position table for a feature map of another size.

    Args:
        table: table (2 * trained size - 1, d).
        size: height or width of the map in pixels.
        block: number of pixels that the result covers.
        position: ``"interpolate"`` or ``"offset"``, see :class:`BoTNetMixer`.

    Returns:
        Tensor (2 * block - 1, d) with a row for each offset from -(block - 1) to block - 1.
    """
    last = (table.shape[0] - 1) // 2
    if not (torch.jit.is_tracing() or is_exporting()) and size == block == last + 1:
        return table  # a graph would be bound to this size
    # half precision cannot hold row indices exactly
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    offsets = torch.arange(1 - block, block, device=table.device, dtype=dtype)
    if position == "interpolate":
        offsets = torch.nan_to_num(offsets * last / (size - 1))  # 0 / 0 on a map of one pixel
    rows = (offsets + last).clamp(0, 2 * last)
    lower = rows.floor()
    fraction = (rows - lower).to(table.dtype)[:, None]
    index = lower.long()
    return table[index] * (1 - fraction) + table[(index + 1).clamp(max=2 * last)] * fraction
