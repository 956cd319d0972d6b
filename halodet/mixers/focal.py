"""Focal attention: halo attention with pooled keys of the blocks around a block."""

from halodet.attention import halo_attention
from halodet.mixers.checks import check_integer
from halodet.mixers.halo import HaloMixer, RelativePosition, average_2x2
from halodet.mixers.registry import MixerSpec, register_mixer
from halodet.utils.exporting import channels_last

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@register_mixer("focal")
class FocalMixer(HaloMixer):
    """Halo attention in which each block also attends to one pooled token of each block around it.

    A block is pooled into one token by a learned weight per pixel, shared by all channels, before keys and values are
    projected. A block that the border of the map cuts has the mean of the weighted pixels that it has: their sum is
    scaled by the number of pixels of a whole block over the number of its own. Fine and pooled keys share one softmax.

    At the border, the window of pooled tokens moves inward, and it has fewer tokens on a map of fewer blocks. So all
    tokens belong to the map, and the attention kernels need no mask for them.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides both numbers of channels.
        block_size: side of a block in pixels.
        halo_size: width of the halo around a block in pixels.
        focal_window: side of the window of pooled tokens in blocks, odd; 0 for halo attention alone.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.

    Raises:
        ValueError: the heads do not divide the channels, ``focal_window`` is even, or a size or the backend is invalid.

    Source: Yang et al., Focal Self-attention for Local-Global Interactions in Vision Transformers (arXiv 2107.00641),
    with one pooled level. Deviations: relative positions are those of halo attention, of the query and decomposed, in
    pixels for fine keys and in blocks for pooled ones, instead of biases; nothing wraps around at the border; pooling
    has no bias; the projections have no bias, and the output projection is left out.
    """

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 8,
        block_size: int = 7,
        halo_size: int = 3,
        focal_window: int = 3,
        backend: str = "auto",
    ) -> None:
        check_integer("focal_window", focal_window, 0)
        if focal_window and focal_window % 2 == 0:
            raise ValueError(f"focal_window={focal_window} is invalid: expected an odd number of blocks, or 0")
        super().__init__(
            channels,
            value_channels,
            num_heads=num_heads,
            block_size=block_size,
            halo_size=halo_size,
            border="mask",
            backend=backend,
        )
        self.pool, self.focal_window = stride == 2, focal_window
        if focal_window:
            self.pool_weight = nn.Parameter(torch.full((block_size, block_size), block_size**-2.0))
            self.focal_pos = RelativePosition(focal_window, focal_window, self.depth)
            self.focal_pos.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "FocalMixer":
        options = spec.read_options(block_size=7, halo_size=3, focal_window=3)
        return cls(
            spec.channels,
            spec.value_channels,
            stride=spec.stride,
            num_heads=spec.num_heads,
            backend=spec.backend,
            **options,
        )

    def no_weight_decay(self) -> set[str]:
        pooled = {"pool_weight", "focal_pos.height_rel", "focal_pos.width_rel"} if self.focal_window else set()
        return super().no_weight_decay() | pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride)), in channels last format."""
        x = channels_last(x)
        q = self._split_heads(self.q(x), self.depth)
        k, v = self._project_kv(x)
        extra_k = extra_v = None
        if self.focal_window:
            extra_k, extra_v = self._surround_blocks(*self._project_kv(self._pool_blocks(x)))
        out = halo_attention(
            q, k, v, self.pos_embed.height_rel, self.pos_embed.width_rel, block_size=self.block_size,
            halo_size=self.halo_size, border=self.border, extra_k=extra_k, extra_v=extra_v, backend=self.backend,
        ).flatten(1, 2)  # fmt: skip
        return average_2x2(out) if self.pool else out

    def _pool_blocks(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> tokens of blocks (B, C, rows, columns)."""
        block, (height, width) = self.block_size, x.shape[-2:]
        y, z = torch.arange(height, device=x.device) % block, torch.arange(width, device=x.device) % block
        # Average pooling divides by the number of pixels that a block has inside the map. The cast comes last, so that
        # the gradient adds up the pixels of the map in float32.
        weight = (self.pool_weight * block**2)[y.unsqueeze(1), z].to(x.dtype)
        return F.avg_pool2d(x * weight, block, block, ceil_mode=True)

    def _surround_blocks(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Gather pooled keys and values (B, heads, d, rows, columns) as (B, heads, rows, columns, tokens, d).

        The relative positions become a part of the keys, divided by the scale that halo attention multiplies them with.
        """
        rows, row_offsets = surrounding_blocks(k.shape[3], self.focal_window, k.device)
        columns, column_offsets = surrounding_blocks(k.shape[4], self.focal_window, k.device)
        k, v = (part.permute(0, 1, 3, 4, 2)[:, :, rows[:, None, :, None], columns[:, None, :]] for part in (k, v))
        height_rel, width_rel = self.focal_pos.height_rel[row_offsets], self.focal_pos.width_rel[column_offsets]
        k = k + ((height_rel[:, None, :, None] + width_rel[:, None, :]) * self.depth**0.5).to(k.dtype)
        return k.flatten(4, 5), v.flatten(4, 5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, focal_window={self.focal_window}"


def surrounding_blocks(count: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the blocks around each block in one direction, moved inward at the border.

    Args:
        count: number of blocks.
        window: number of blocks around each one and itself, odd; fewer if there are fewer blocks.
        device: device of the result.

    Returns:
        Blocks (count, window) and rows of the position table, where row ``window - 1`` is that of the block itself.
    """
    blocks = torch.arange(count, device=device)
    offsets = blocks[:window]  # sizes stay tensors: a traced graph takes any number of blocks
    first = torch.minimum((blocks - window // 2).clamp(min=0), blocks[-1] - offsets[-1]).unsqueeze(1)
    return first + offsets, first + offsets - blocks.unsqueeze(1) + window - 1
