"""Neighborhood attention: each pixel attends to the k x k pixels around it."""

from halodet.mixers.halo import average_2x2, check_heads
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer

import torch
from torch import Tensor, nn


@register_mixer("neighborhood")
class NeighborhoodMixer(Mixer):
    """Attention of each pixel to exactly k x k pixels, with a learned bias for each offset and head.

    At the border the neighbourhood moves inward instead of becoming smaller. With a dilation of r, the pixels of a
    neighbourhood are r apart, and the rule holds among the pixels whose coordinates have the same remainder. On a map
    of fewer than k * r pixels in a direction, first the dilation and then the neighbourhood is reduced.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides both numbers of channels.
        kernel_size: side of the neighbourhood in pixels, odd.
        dilation: distance of the neighbourhood's pixels.

    Raises:
        ValueError: the heads do not divide the channels, ``kernel_size`` is even, or ``dilation`` is not positive.

    Source: Hassani et al., Neighborhood Attention Transformer (arXiv 2204.07143), and Hassani and Shi, Dilated
    Neighborhood Attention Transformer (arXiv 2209.15001).
    """

    is_attention = True

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 8,
        kernel_size: int = 7,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        check_heads(num_heads, channels, value_channels)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is invalid: expected an odd number of pixels")
        if dilation < 1:
            raise ValueError(f"dilation={dilation} is invalid: expected at least 1")
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.kernel_size, self.dilation, self.channels = kernel_size, dilation, channels
        self.qkv = nn.Conv2d(channels, 2 * channels + value_channels, 1)
        self.bias = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "NeighborhoodMixer":
        options = spec.read_options(kernel_size=7, dilation=1)
        return cls(spec.channels, spec.value_channels, stride=spec.stride, num_heads=spec.num_heads, **options)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        nn.init.zeros_(self.qkv.get_parameter("bias"))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"bias"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride))."""
        batch, _, height, width = x.shape
        parts = self.qkv(x).split((self.channels, self.channels, self.out_channels), 1)
        q, k, v = (part.reshape(batch, self.num_heads, -1, height, width) for part in parts)
        rows, row_offsets = neighbours(height, self.kernel_size, self.dilation, x.device)
        columns, column_offsets = neighbours(width, self.kernel_size, self.dilation, x.device)
        bias = self.bias.to(q.dtype)
        q = q * q.shape[2] ** -0.5
        # One row and column of the neighbourhood at a time: all k * k keys at once would need their memory.
        taps = [(i, j) for i in range(rows.shape[1]) for j in range(columns.shape[1])]
        logits = torch.stack(
            [
                (q * k[..., rows[:, i, None], columns[:, j]]).sum(2)
                + bias[:, row_offsets[:, i, None], column_offsets[:, j]]
                for i, j in taps
            ]
        )
        weights = logits.softmax(0, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
        out = torch.zeros_like(v)
        for tap, (i, j) in enumerate(taps):
            out = out + weights[tap].unsqueeze(2) * v[..., rows[:, i, None], columns[:, j]]
        out = out.flatten(1, 2)
        return average_2x2(out) if self.stride == 2 else out

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kernel={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"


def neighbours(size: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the neighbourhood of each place on a line, and the row of the bias table for each neighbour.

    Args:
        size: number of places.
        kernel_size: number of neighbours, odd; fewer on a line with fewer places.
        dilation: distance of neighbours; smaller on a line of fewer than ``kernel_size * dilation`` places.
        device: device of the result.

    Returns:
        Places (size, k) and rows (size, k), where row ``kernel_size - 1`` is that of the place itself.
    """
    dilation = max(1, min(dilation, size // kernel_size))
    count = min(kernel_size, size)
    place = torch.arange(size, device=device)
    remainder, index = place % dilation, place // dilation
    last = (size - 1 - remainder) // dilation + 1 - count  # first index of the last neighbourhood
    first = torch.minimum((index - kernel_size // 2).clamp(min=0), last)
    indices = first[:, None] + torch.arange(count, device=device)
    return indices * dilation + remainder[:, None], indices - index[:, None] + kernel_size - 1
