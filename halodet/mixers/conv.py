"""The 3x3 convolution of a ResNet bottleneck."""

from __future__ import annotations

from halodet.mixers.registry import Mixer, MixerSpec, register_mixer

from torch import Tensor, nn


@register_mixer("conv")
class ConvMixer(Mixer):
    """A 3x3 convolution without bias that keeps the number of channels.

    Args:
        channels: number of input and output channels.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> ConvMixer:
        return cls(spec.channels, stride=spec.stride, **spec.read_options())

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))."""
        return self.conv(x)
