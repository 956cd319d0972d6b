"""Blocked local self-attention with a halo."""

from collections.abc import Mapping
from typing import Any

from halodet.attention import BORDERS, halo_attention
from halodet.attention.unfold import attend_windows
from halodet.mixers.checks import check_backend, check_block, check_choice, check_heads
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.mixers.rel_pos import infer_block_and_halo, resize_table
from halodet.utils.exporting import channels_last

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativePosition(nn.Module):
    """Relative position tables (2 * height - 1, depth) and (2 * width - 1, depth) of a window, shared by all heads."""

    def __init__(self, height: int, width: int, depth: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * height - 1, depth))
        self.width_rel = nn.Parameter(torch.empty(2 * width - 1, depth))

    def reset_parameters(self) -> None:
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=table.shape[1] ** -0.5)


@torch.fx.wrap  # a symbolic trace keeps the call: it depends on shapes and the device
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    block_size: int,
    halo_size: int,
    border: str,
    stride: int,
    backend: str,
) -> Tensor:
    """Call halo_attention; in TorchScript, which cannot compile its checks, the unfold backend."""
    if torch.jit.is_scripting():
        return attend_windows(
            q, k, v, rel_h.to(q.dtype), rel_w.to(q.dtype), None, None, k.shape[3], k.shape[4], block_size,
            [halo_size] * 4, stride, border == "mask", float(q.shape[2]) ** -0.5,
        )  # fmt: skip
    else:
        return halo_attention(
            q, k, v, rel_h, rel_w, block_size=block_size, halo_size=halo_size, border=border, stride=stride,
            backend=backend,
        )  # fmt: skip


@register_mixer("halo")
class HaloMixer(Mixer):
    """Blocked local self-attention with a halo, without bias and without an output projection.

    Parameter names, and the order of channels in ``kv`` (keys, then values, inside each head), are those of timm's
    ``HaloAttn``, so that its weights load unchanged.

    Args:
        channels: number of input channels.
        value_channels: number of channels of the values over all heads, which is the number of output channels.
        stride: 1 or 2. With 2, every second query in each direction is kept; if ``block_size`` is odd, the output of
            stride 1 is averaged over 2x2 pixels instead.
        num_heads: number of heads; divides the channels of queries and of values.
        block_size: side of a block in pixels.
        halo_size: width of the halo around a block in pixels.
        border: ``"zero"`` or ``"mask"``, see :func:`halodet.attention.halo_attention`.
        qk_channels: number of channels of queries and keys over all heads; defaults to ``channels``.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.

    Raises:
        ValueError: the heads do not divide the channels, or a size, border or backend is invalid.

    Source: Vaswani et al., CVPR 2021 (arXiv 2103.12731); initialization and layout as in timm.
    """

    is_attention = True
    rel_pos_tables = ("pos_embed.height_rel", "pos_embed.width_rel")

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
        check_block(block_size, halo_size)
        check_choice("border", border, BORDERS)
        check_heads(num_heads, qk_channels, value_channels)
        check_backend(backend)
        self.out_channels, self.num_heads = value_channels, num_heads
        self.block_size, self.halo_size, self.border, self.backend = block_size, halo_size, border, backend
        self.pool = stride > 1 and block_size % stride != 0
        self.query_stride = 1 if self.pool else stride
        self.depth, self.value_depth = qk_channels // num_heads, value_channels // num_heads
        self.q = nn.Conv2d(channels, qk_channels, 1, stride=self.query_stride, bias=False)
        self.kv = nn.Conv2d(channels, qk_channels + value_channels, 1, bias=False)
        window = block_size + 2 * halo_size
        self.pos_embed = RelativePosition(window, window, self.depth)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "HaloMixer":
        return cls(
            spec.channels,
            spec.value_channels,
            stride=spec.stride,
            num_heads=spec.num_heads,
            block_size=spec.block_size,
            halo_size=spec.halo_size,
            border=spec.border,
            backend=spec.backend,
            **spec.read_options(),
        )

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.q.weight, std=self.q.in_channels**-0.5)
        nn.init.trunc_normal_(self.kv.weight, std=self.kv.in_channels**-0.5)
        self.pos_embed.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride)), in channels last format."""
        x = channels_last(x)  # which attention and 1x1 convolutions both prefer
        q = self._split_heads(self.q(x), self.depth)
        k, v = self._project_kv(x)
        out = _attend(
            q, k, v, self.pos_embed.height_rel, self.pos_embed.width_rel, self.block_size, self.halo_size, self.border,
            self.query_stride, self.backend,
        )  # fmt: skip
        out = out.flatten(1, 2)
        return average_2x2(out) if self.pool else out

    def _project_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, heads, d, H, W).

        They are projected separately because splitting one map would copy their gradients into one again.
        """
        weights = self.kv.weight.view(self.num_heads, self.depth + self.value_depth, -1, 1, 1)
        k_weight, v_weight = weights.split([self.depth, self.value_depth], dim=1)
        k = self._split_heads(F.conv2d(x, k_weight.flatten(0, 1)), self.depth)
        return k, self._split_heads(F.conv2d(x, v_weight.flatten(0, 1)), self.value_depth)

    def _split_heads(self, x: Tensor, depth: int) -> Tensor:
        return x.view(x.shape[0], self.num_heads, depth, x.shape[2], x.shape[3])

    def extra_repr(self) -> str:
        stride = 2 if self.pool else self.query_stride
        sizes = f"heads={self.num_heads}, block={self.block_size}, halo={self.halo_size}"
        return f"{sizes}, border={self.border!r}, stride={stride}"

    def rel_pos_layout(self) -> dict[str, int]:
        return {"block_size": self.block_size, "halo_size": self.halo_size}

    def infer_rel_pos_layout(self, rows: int, metadata: Mapping[str, Any]) -> dict[str, int]:
        block, halo = infer_block_and_halo(rows, (self.block_size, self.halo_size), metadata)
        return {"block_size": block, "halo_size": halo} if block >= 1 and rows % 2 else self.rel_pos_layout()

    def resize_rel_pos(self, table: Tensor, layout: Mapping[str, int]) -> Tensor:
        old, new = (layout["block_size"], layout["halo_size"]), (self.block_size, self.halo_size)
        return table if old == new else resize_table(table, old, new)


def average_2x2(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)); a mean covers only pixels inside the map."""
    return F.avg_pool2d(x, 2, 2, ceil_mode=True)
