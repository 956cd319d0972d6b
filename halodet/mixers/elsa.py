"""Enhanced local self-attention (ELSA)."""

from halodet.mixers.checks import check_heads, check_integer, check_kernel_size
from halodet.mixers.halo import average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.mixers.tap_sum import sum_taps

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@register_mixer("elsa")
class ElsaMixer(Mixer):
    """Local attention whose logits are computed from elementwise products of queries and keys.

    A grouped convolution over the products of each pixel's own query and key gives the logits of its neighborhood, so
    no position table is needed. The ghost head turns the maps of few heads into one per channel: a learned kernel per
    channel is multiplied with the head's weights, or added to them. Added, it is a depthwise convolution. Pixels
    outside the map are zeros that keep their share of the softmax.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides ``value_channels``.
        kernel_size: side of the neighborhood in pixels, odd.
        dilation: distance of the neighborhood's pixels.
        group_width: number of channels of each group of the convolution over products.
        multiply: whether the ghost head multiplies.
        add: whether the ghost head adds.

    Raises:
        ValueError: the heads do not divide the channels, ``kernel_size`` is even, or a size is not positive.

    Source: Zhou et al., ELSA: Enhanced Local Self-Attention for Vision Transformer (arXiv 2112.12786). The output
    projection is left out: the bottleneck has one.
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
        group_width: int = 8,
        multiply: bool = False,
        add: bool = True,
    ) -> None:
        super().__init__()
        check_heads(num_heads, value_channels)
        check_kernel_size(kernel_size)
        check_integer("dilation", dilation)
        check_integer("group_width", group_width)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.kernel_size, self.dilation = kernel_size, dilation
        taps, padding = kernel_size**2, dilation * (kernel_size // 2)
        self.qk_channels = -(-2 * max(channels // 3, 1) // group_width) * group_width
        self.qkv = nn.Conv2d(channels, 2 * self.qk_channels + value_channels, 1)
        self.products = nn.Conv2d(
            self.qk_channels, self.qk_channels, kernel_size, padding=padding, dilation=dilation,
            groups=self.qk_channels // group_width,
        )  # fmt: skip
        self.logits = nn.Conv2d(self.qk_channels, num_heads * taps, 1)
        self.ghost_multiply = nn.Parameter(torch.empty(value_channels, taps)) if multiply else None
        self.ghost_add = nn.Parameter(torch.empty(value_channels, taps)) if add else None
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "ElsaMixer":
        options = spec.read_options(kernel_size=7, dilation=1, group_width=8, multiply=False, add=True)
        return cls(spec.channels, spec.value_channels, stride=spec.stride, num_heads=spec.num_heads, **options)

    def reset_parameters(self) -> None:
        for conv in (self.qkv, self.products, self.logits):
            nn.init.trunc_normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
            nn.init.zeros_(conv.get_parameter("bias"))
        if self.ghost_multiply is not None:
            nn.init.normal_(self.ghost_multiply)
        if self.ghost_add is not None:
            nn.init.trunc_normal_(self.ghost_add, std=0.02)

    def no_weight_decay(self) -> set[str]:
        ghosts = {"ghost_multiply": self.ghost_multiply, "ghost_add": self.ghost_add}
        return {name for name, ghost in ghosts.items() if ghost is not None}

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride))."""
        q, k, v = self.qkv(x).split((self.qk_channels, self.qk_channels, self.out_channels), 1)
        logits = self.logits(F.gelu(self.products(q * k)))
        # Not unflatten, after which an ONNX exporter takes the height and width for constants.
        shape = (x.shape[0], self.num_heads, -1, *x.shape[2:])
        weights = logits.reshape(shape).softmax(2, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, heads = weights.to(v.dtype), v.reshape(shape)
        if self.ghost_multiply is None:
            out = sum_taps(weights, heads, self.kernel_size, self.dilation)
        else:
            out = self._multiplied_sum(weights, heads, self.ghost_multiply)
        out = out.flatten(1, 2)
        if self.ghost_add is not None:
            kernel = self.ghost_add.to(v.dtype).view(-1, 1, self.kernel_size, self.kernel_size)
            padding = self.dilation * (self.kernel_size // 2)
            out = out + F.conv2d(v, kernel, None, 1, padding, self.dilation, self.out_channels)
        return average_2x2(out) if self.stride == 2 else out

    def _multiplied_sum(self, weights: Tensor, values: Tensor, ghost: Tensor) -> Tensor:
        """Sum as :func:`sum_taps`, with weights that are multiplied by ``ghost`` (C, taps) for each channel."""
        height, width = values.shape[-2:]
        padded = F.pad(values, (self.dilation * (self.kernel_size // 2),) * 4)
        out = torch.zeros_like(values)
        for tap in range(self.kernel_size**2):
            top, left = self.dilation * (tap // self.kernel_size), self.dilation * (tap % self.kernel_size)
            part = padded[..., top : top + height, left : left + width]
            part = part * ghost[:, tap].to(values.dtype).view(self.num_heads, -1, 1, 1)
            out = out + weights[:, :, tap].unsqueeze(2) * part
        return out

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kernel={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"
