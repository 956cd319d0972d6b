"""The 3x3 convolution of a ResNet bottleneck."""

from halodet.mixers.registry import Mixer, MixerSpec, register_mixer

from torch import Tensor, nn


@register_mixer("conv")
class ConvMixer(Mixer):
    """A 3x3 convolution without bias that keeps the number of channels.

    Args:
        channels: number of input and output channels.
        stride: 1 or 2.
        dilation: distance of the kernel's pixels.
    """

    def __init__(self, channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "ConvMixer":
        dilation = {"dilation": spec.dilation} if spec.dilation > 1 else {}  # which subclasses need not know
        return cls(spec.channels, stride=spec.stride, **dilation, **spec.read_options())

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))."""
        return self.conv(x)
