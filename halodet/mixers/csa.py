"""Convolutional self-attention (CSA): 3x3 patches whose pixels are projected by tap and mixed by attention."""

from halodet.mixers.checks import check_heads
from halodet.mixers.halo import average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TAPS = 9  # of a 3x3 patch, row by row


@register_mixer("csa")
class CsaMixer(Mixer):
    """A 3x3 convolution before its sum over taps, whose terms attention mixes within each patch.

    Patches of 3x3 pixels are centered on every second row and column. Each of their 9 pixels is projected by a matrix
    of its own. A linear function of the mean of 2x2 pixels at the center gives, for each head, the 9x9 weights that mix
    the projected pixels. The mixed patches are added up where they overlap. Pixels outside the map are zeros that keep
    their share of the softmax; what is mixed into them is dropped.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides ``value_channels``.

    Raises:
        ValueError: the heads do not divide the channels.

    Source: Yang et al., Lite Vision Transformer with Enhanced Self-Attention (arXiv 2112.10809). The output projection
    is left out: the bottleneck has one.
    """

    is_attention = True

    def __init__(self, channels: int, value_channels: int, *, stride: int = 1, num_heads: int = 8) -> None:
        super().__init__()
        check_heads(num_heads, value_channels)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.logits = nn.Conv2d(channels, num_heads * _TAPS**2, 1, bias=False)
        self.values = nn.Parameter(torch.empty(value_channels, channels, 3, 3))
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "CsaMixer":
        return cls(
            spec.channels, spec.value_channels, stride=spec.stride, num_heads=spec.num_heads, **spec.read_options()
        )

    def reset_parameters(self) -> None:
        # Each tap is a projection by itself, so its inputs are the channels of one pixel.
        for weight in (self.logits.weight, self.values):
            nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride))."""
        height, width = x.shape[-2:]
        depth = self.out_channels // self.num_heads
        logits = self.logits(average_2x2(x)) * depth**-0.5
        rows, columns = logits.shape[-2:]
        weights = logits.reshape(-1, self.num_heads, _TAPS, _TAPS, rows, columns).softmax(
            3, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        # One matrix product: the gradient of each tap's view of the weights would be a tensor of their full size.
        pixels = torch.stack(_unfold(x, rows, columns), 1).flatten(3)
        values = torch.matmul(self.values.flatten(2).permute(2, 0, 1), pixels)
        values = values.reshape(-1, _TAPS, self.num_heads, depth, rows, columns)
        mixed = torch.einsum("bhijyx,bjhdyx->bihdyx", weights.to(values.dtype), values)
        out = _fold(mixed.flatten(2, 3))[..., :height, :width]
        return average_2x2(out) if self.stride == 2 else out

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, stride={self.stride}"


def _unfold(x: Tensor, rows: int, columns: int) -> list[Tensor]:
    """Return, for each tap of 3x3 patches two pixels apart, its pixels (B, C, rows, columns) in all patches.

    They are views of a copy of the map that is split by even and odd rows and columns. The gradient of a view of every
    second pixel is a map of the full size for each tap, which takes longer.
    """
    padded = F.pad(x, (1, 2, 1, 2))[..., : 2 * rows + 2, : 2 * columns + 2]
    parts = F.pixel_unshuffle(padded, 2).reshape(-1, x.shape[1], 2, 2, rows + 1, columns + 1)
    taps = [divmod(tap, 3) for tap in range(_TAPS)]
    return [parts[:, :, i % 2, j % 2, i // 2 : i // 2 + rows, j // 2 : j // 2 + columns] for i, j in taps]


def _fold(patches: Tensor) -> Tensor:
    """Add up 3x3 patches (B, 9, C, rows, columns) two pixels apart to a map (B, C, 2 * rows, 2 * columns).

    The first patch is centered on the first pixel. A pixel of an even row and column gets the center of one patch; at
    an odd row or column two patches overlap.
    """
    top_left, top, top_right, left, center, right, bottom_left, bottom, bottom_right = patches.unbind(1)
    even_odd = right + _next_column(left)
    odd_even = bottom + _next_row(top)
    odd_odd = bottom_right + _next_column(bottom_left) + _next_row(top_right + _next_column(top_left))
    return F.pixel_shuffle(torch.stack([center, even_odd, odd_even, odd_odd], 2).flatten(1, 2), 2)


def _next_column(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1))[..., 1:]


def _next_row(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 1))[..., 1:, :]
