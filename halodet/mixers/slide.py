"""Slide attention: local attention whose neighbors are gathered by one learned depthwise convolution."""

from halodet.mixers.checks import check_choice, check_heads, check_kernel_size
from halodet.mixers.halo import average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BIAS_TARGETS = ("logits", "keys")


@register_mixer("slide")
class SlideMixer(Mixer):
    """Attention of each pixel to k x k keys and values that a depthwise convolution gathers around it.

    For each of the k x k taps, the kernel of the convolution is the sum of a fixed one, which shifts the map by the
    offset of the tap, and a learned one. All heads, and both keys and values, share the convolution. Pixels outside the
    map are zeros that keep their share of the softmax.

    Args:
        channels: number of input channels.
        value_channels: number of output channels, and of queries and keys: they share the convolution of the values.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides ``value_channels``.
        kernel_size: side of the neighborhood in pixels, odd. Time grows with its fourth power.
        bias_on: what the bias per head and tap is added to: the ``"logits"``, or all channels of the ``"keys"`` as in
            the original, where the bias counts as many times as the sum of the scaled query.

    Raises:
        ValueError: the heads do not divide the channels, ``kernel_size`` is even, or ``bias_on`` is unknown.

    Source: Pan et al., Slide-Transformer: Hierarchical Vision Transformer with Local Self-Attention (arXiv 2304.04237).
    The output projection is left out: the bottleneck has one.
    """

    is_attention = True

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 8,
        kernel_size: int = 3,
        bias_on: str = "logits",
    ) -> None:
        super().__init__()
        check_heads(num_heads, value_channels)
        check_kernel_size(kernel_size)
        check_choice("bias_on", bias_on, BIAS_TARGETS)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.kernel_size, self.bias_on = kernel_size, bias_on
        depth, taps = value_channels // num_heads, kernel_size**2
        self.qkv = nn.Conv2d(channels, 3 * value_channels, 1)
        self.deformed = nn.Parameter(torch.empty(depth, taps, kernel_size, kernel_size))
        self.gather_bias = nn.Parameter(torch.empty(depth, taps))
        self.position_bias = nn.Parameter(torch.empty(num_heads, taps))
        self.register_buffer("shift", torch.eye(taps).view(taps, kernel_size, kernel_size), persistent=False)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "SlideMixer":
        options = spec.read_options(kernel_size=3, bias_on="logits")
        return cls(spec.channels, spec.value_channels, stride=spec.stride, num_heads=spec.num_heads, **options)

    def reset_parameters(self) -> None:
        """Initialize; zeros in the learned kernel start the mixer as attention to the pixels themselves."""
        nn.init.trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        nn.init.zeros_(self.qkv.get_parameter("bias"))
        nn.init.zeros_(self.deformed)
        nn.init.zeros_(self.gather_bias)
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"gather_bias", "position_bias"}

    def merged_kernel(self) -> Tensor:
        """Return the kernel (depth, k * k, k, k) that gathers k * k maps from each channel of a head."""
        return self.deformed + self.get_buffer("shift")

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride))."""
        exact = torch.promote_types(x.dtype, torch.float32)
        height, width = x.shape[-2:]
        depth = self.out_channels // self.num_heads
        # Heads share all kernels, so they are part of the batch; q, k and v follow each other inside each head.
        q, k, v = self.qkv(x).reshape(-1, 3 * depth, height, width).split(depth, 1)
        q = q * depth**-0.5
        # Gathering is linear. One pixel of the kernel at a time, it is a 1x1 convolution of products with the shifted
        # map, which needs neither k * k maps at once nor slow depthwise convolutions.
        kernel = self.merged_kernel().flatten(2)
        logits = F.conv2d(q, self.gather_bias.t()[..., None, None]).to(exact)
        for pixel, shifted in enumerate(self._shifted(k)):
            logits = logits + F.conv2d(q * shifted, kernel[..., pixel].t()[..., None, None]).to(exact)
        weights = self._add_position_bias(logits, q).softmax(1).to(v.dtype)
        out = F.conv2d(weights, self.gather_bias[..., None, None])
        for pixel, shifted in enumerate(self._shifted(v)):
            out = out + F.conv2d(weights, kernel[..., pixel, None, None]) * shifted
        out = out.reshape(-1, self.out_channels, height, width)
        return average_2x2(out) if self.stride == 2 else out

    def _shifted(self, x: Tensor) -> list[Tensor]:
        """Return views of one padded copy of the map, which are the map shifted to each pixel of the kernel."""
        height, width = x.shape[-2:]
        padded = F.pad(x, (self.kernel_size // 2,) * 4)
        offsets = range(self.kernel_size)
        return [padded[..., top : top + height, left : left + width] for top in offsets for left in offsets]

    def _add_position_bias(self, logits: Tensor, q: Tensor) -> Tensor:
        """Add the bias of each head and tap to logits (B * heads, k * k, H, W)."""
        taps, height, width = logits.shape[1:]
        bias = self.position_bias.to(logits.dtype)[..., None, None]
        if self.bias_on == "keys":
            bias = bias * q.sum(1).to(logits.dtype).reshape(-1, self.num_heads, 1, height, width)
        return (logits.reshape(-1, self.num_heads, taps, height, width) + bias).reshape(logits.shape)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kernel={self.kernel_size}, bias_on={self.bias_on!r}, stride={self.stride}"
