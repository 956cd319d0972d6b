"""External attention after a 3x3 convolution."""

from collections.abc import Callable

from halodet.mixers.checks import check_integer
from halodet.mixers.conv import ConvMixer
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer

import torch
from torch import Tensor, nn

_EPSILON = 1e-9  # of the sum over memory slots


class ExternalAttention(Mixer):
    """Attention of all pixels to a learned memory, added to the input.

    Each pixel is a weighted sum of ``slots`` learned values. The weights are normalized twice: by a softmax over the
    pixels for each slot, and by their sum over the slots. Permuting the pixels permutes the output, so the module does
    not mix neighbors by itself.

    Args:
        channels: number of input and output channels.
        slots: number of learned keys and values.
        norm: factory of the normalization layer before the addition.

    Raises:
        ValueError: ``slots`` is not positive.

    Source: Guo et al., Beyond Self-Attention (arXiv 2105.02358).
    """

    def __init__(self, channels: int, *, slots: int = 64, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        check_integer("slots", slots)
        self.out_channels = channels
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.memory_k = nn.Parameter(torch.empty(slots, channels))
        self.memory_v = nn.Parameter(torch.empty(slots, channels))
        self.proj_out = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm(channels)
        self.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        return {"memory_k", "memory_v"}

    def reset_parameters(self) -> None:
        """Initialize; keys and values start as the same numbers, as in the original."""
        self.proj_in.reset_parameters()
        self.proj_out.reset_parameters()
        nn.init.normal_(self.memory_k, std=(2 / self.memory_k.shape[1]) ** 0.5)
        with torch.no_grad():
            self.memory_v.copy_(self.memory_k)

    def attend(self, x: Tensor) -> Tensor:
        """Read the memory: (B, channels, H, W) -> (B, channels, H, W)."""
        logits = torch.einsum("sc,bcn->bsn", self.memory_k.to(x.dtype), x.flatten(2))
        # Weights of about 1 / (H * W) are below the smallest numbers of half types.
        exact = torch.promote_types(x.dtype, torch.float32)
        weights = logits.softmax(-1, dtype=exact)
        weights = weights / (weights.sum(1, keepdim=True) + _EPSILON)
        return torch.einsum("sc,bsn->bcn", self.memory_v.to(x.dtype), weights.to(x.dtype)).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, channels, H, W)."""
        return x + self.norm(self.proj_out(self.attend(self.proj_in(x))))


@register_mixer("external")
class ExternalMixer(ConvMixer):
    """A 3x3 convolution and :class:`ExternalAttention`; a ResNet's weights load into the convolution.

    Args:
        channels: number of input and output channels.
        stride: stride of the convolution, 1 or 2.
        dilation: distance of the convolution's pixels.
        slots: number of learned keys and values.
        norm: factory of normalization layers.
    """

    def __init__(
        self,
        channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        slots: int = 64,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(channels, stride=stride, dilation=dilation)
        self.attention = ExternalAttention(channels, slots=slots, norm=norm)

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "ExternalMixer":
        options = spec.read_options(slots=64)
        return cls(spec.channels, stride=spec.stride, dilation=spec.dilation, norm=spec.norm, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))."""
        return self.attention(self.conv(x))
