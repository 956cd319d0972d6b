"""Attention whose weights depend on the keys only, over a neighborhood and over the whole map."""

from halodet.mixers.checks import check_choice, check_heads, check_kernel_size
from halodet.mixers.halo import average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.utils.exporting import channels_last

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCOPES, GATES = ("both", "local", "global"), ("none", "value", "sigmoid")
_RANGE = 80.0  # of the logits of a map in one neighborhood average; exp(-80) is a float32


@register_mixer("key_only")
class KeyOnlyMixer(Mixer):
    """Key-only attention: a pixel's weight is the same for all queries. Memory is linear in the number of pixels.

    After the abstract of Li and Liu, arXiv 2207.00188; the details are halodet's own, as the paper's are not public
    code. A learned vector per head turns each key into one logit. The values are averaged with these weights over a
    square neighborhood of each pixel, and over the whole map; a learned share per head mixes the two.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides both numbers of channels.
        kernel_size: side of the neighborhood in pixels, odd.
        scope: ``"both"``, ``"local"`` (the neighborhood only) or ``"global"`` (the map only).
        gate: what each output pixel is multiplied with: ``"none"``, its own ``"value"``, or the ``"sigmoid"`` of a
            projection of the input.

    Raises:
        ValueError: the heads do not divide the channels, ``kernel_size`` is even, or ``scope`` or ``gate`` is unknown.
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
        scope: str = "both",
        gate: str = "none",
    ) -> None:
        super().__init__()
        check_heads(num_heads, channels, value_channels)
        check_kernel_size(kernel_size)
        check_choice("scope", scope, SCOPES)
        check_choice("gate", gate, GATES)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.kernel_size, self.scope, self.gate = kernel_size, scope, gate
        self.kv = nn.Conv2d(channels, channels + value_channels, 1, bias=False)
        self.saliency = nn.Parameter(torch.empty(num_heads, channels // num_heads))
        self.share = nn.Parameter(torch.empty(num_heads)) if scope == "both" else None
        self.gate_proj = nn.Conv2d(channels, value_channels, 1) if gate == "sigmoid" else None
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "KeyOnlyMixer":
        options = spec.read_options(kernel_size=7, scope="both", gate="none")
        return cls(spec.channels, spec.value_channels, stride=spec.stride, num_heads=spec.num_heads, **options)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.kv.weight, std=self.kv.in_channels**-0.5)
        nn.init.normal_(self.saliency, std=self.saliency.shape[1] ** -0.5)
        if self.share is not None:
            nn.init.zeros_(self.share)
        if self.gate_proj is not None:
            self.gate_proj.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        return {"saliency"} | ({"share"} if self.share is not None else set())

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride)), in channels last format."""
        x = channels_last(x)
        batch, _, height, width = x.shape
        keys, values = self.kv(x).split((self.kv.in_channels, self.out_channels), 1)
        exact = torch.promote_types(values.dtype, torch.float32)
        keys = keys.reshape(batch, self.num_heads, -1, height, width).to(exact)
        vector = self.saliency.to(exact) * self.saliency.shape[1] ** -0.5
        logits = torch.einsum("bhdyx,hd->bhyx", keys, vector)
        heads = values.reshape(batch, self.num_heads, -1, height, width).to(exact)
        parts = {}
        if self.scope != "global":
            parts["local"] = self._average_locally(logits, heads)
        if self.scope != "local":
            weights = logits.flatten(2).softmax(-1)
            parts["global"] = torch.einsum("bhn,bhdn->bhd", weights, heads.flatten(3))[..., None, None].expand_as(heads)
        if self.share is None:
            (out,) = parts.values()
        else:
            share = self.share.to(exact).sigmoid().view(-1, 1, 1, 1)
            out = share * parts["local"] + (1 - share) * parts["global"]
        out = out.to(values.dtype).reshape(batch, -1, height, width)
        if self.gate == "value":
            out = out * values
        elif self.gate_proj is not None:
            out = out * self.gate_proj(x).sigmoid()
        return average_2x2(out) if self.stride == 2 else out

    def _average_locally(self, logits: Tensor, values: Tensor) -> Tensor:
        """Average values (B, heads, d, H, W) over the neighborhood of each pixel with weights exp(logits).

        Logits of more than 80 below the largest one of the map count as 80 below it.
        """
        highest = logits.flatten(2).amax(-1)[..., None, None].detach()
        weights = (logits - highest).clamp(min=-_RANGE).exp()
        summed = self._average_box((weights.unsqueeze(2) * values).flatten(1, 2)).reshape(values.shape)
        return summed / self._average_box(weights).unsqueeze(2)

    def _average_box(self, x: Tensor) -> Tensor:
        """Average (B, C, H, W) over the neighborhood of each pixel, with zeros outside the map."""
        size, padding = self.kernel_size, self.kernel_size // 2
        # Pooling is several times as fast in channels last format.
        x = F.avg_pool2d(channels_last(x), (size, 1), 1, (padding, 0))
        return F.avg_pool2d(x, (1, size), 1, (0, padding))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kernel={self.kernel_size}, scope={self.scope!r}, gate={self.gate!r}"
