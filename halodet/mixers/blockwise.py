"""Block-wise attention: blocks that see their lower right neighbors only, or their upper left ones."""

from halodet.attention import halo_attention
from halodet.mixers.checks import check_backend, check_block, check_choice, check_heads
from halodet.mixers.halo import average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.utils.exporting import channels_last

import torch
from torch import Tensor, nn


@register_mixer("blockwise")
class BlockwiseMixer(Mixer):
    """Attention of blocks to windows with a one-sided halo, without a position term and without a scale.

    The windows of the original are 36 pixels wide, and overlap by 12. Where they overlap, the last one counts: a pixel
    is a query of the window whose upper left part it is in. So a block of 24 x 24 pixels sees itself and 12 pixels
    below and to the right, and information moves up and to the left only. ``mirrored`` turns the direction: stages that
    use both let it move everywhere. In a network, the option ``mirrored: alternate`` turns it in every second block.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides both numbers of channels.
        block_size: side of a block in pixels.
        halo_size: pixels that a window is larger than its block, on one side.
        mirrored: whether a block sees the pixels above and to the left of it instead.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.

    Raises:
        ValueError: the heads do not divide the channels, or a size or the backend is invalid.

    Source: Jiang et al., Local block-wise self attention for normal organ segmentation (arXiv 1909.05054). The residual
    addition is left to the bottleneck.
    """

    is_attention = True

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 1,
        block_size: int = 24,
        halo_size: int = 12,
        mirrored: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(num_heads, channels, value_channels)
        check_backend(backend)
        check_block(block_size, halo_size)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.channels, self.block_size, self.mirrored, self.backend = channels, block_size, mirrored, backend
        self.halo_size = (halo_size, 0, halo_size, 0) if mirrored else (0, halo_size, 0, halo_size)
        self.qkv = nn.Conv2d(channels, 2 * channels + value_channels, 1)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "BlockwiseMixer":
        options = spec.read_options(num_heads=1, block_size=24, halo_size=12, mirrored=False)
        check_choice("mirrored", options["mirrored"], (False, True, "alternate"))
        if options["mirrored"] == "alternate":
            options["mirrored"] = spec.index % 2 == 1
        return cls(spec.channels, spec.value_channels, stride=spec.stride, backend=spec.backend, **options)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        nn.init.zeros_(self.qkv.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride)), in channels last format."""
        x = channels_last(x)
        parts = self.qkv(x).split((self.channels, self.channels, self.out_channels), 1)
        depths = (self.channels // self.num_heads,) * 2 + (self.out_channels // self.num_heads,)
        q, k, v = (
            part.view(x.shape[0], self.num_heads, depth, x.shape[2], x.shape[3])
            for part, depth in zip(parts, depths, strict=True)
        )
        window = self.block_size + max(self.halo_size)
        no_position = torch.zeros(2 * window - 1, q.shape[2], dtype=q.dtype, device=q.device)
        out = halo_attention(
            q, k, v, no_position, no_position, block_size=self.block_size, halo_size=self.halo_size, border="mask",
            scale=1.0, backend=self.backend,
        ).flatten(1, 2)  # fmt: skip
        return average_2x2(out) if self.stride == 2 else out

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, block={self.block_size}, halo={self.halo_size}, stride={self.stride}"
