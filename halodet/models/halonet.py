"""HaloNet as an ``nn.Module``: stem, bottleneck blocks, stages and classifier head."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halodet.mixers import MIXERS, ExternalAttention, MixerSpec, build_mixer
from halodet.mixers.checks import check_integer
from halodet.models.act_checkpoint import Stage, check_stages
from halodet.models.variants import HaloNetVariant, get_variant
from halodet.utils.exporting import channels_last

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth

STAGES = ("res2", "res3", "res4", "res5")
ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
NormLayer = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    """Build a group norm of 32 groups, or fewer where 32 does not divide ``channels`` (80 in H2, 176 in H6)."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


NORMS: dict[str, NormLayer] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": group_norm,
}


class ConvNorm(nn.Sequential):
    """A convolution without bias, followed by a normalization layer."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, norm: NormLayer
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv", conv)
        self.add_module("norm", norm(out_channels))


class Stem(nn.Module):
    """7x7 convolution and max pooling, stride 4: (B, in_channels, H, W) -> (B, channels, ceil(H / 4), ceil(W / 4))."""

    def __init__(
        self, in_channels: int, channels: int, *, norm: NormLayer, activation: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, channels, 7, stride=2, norm=norm)
        self.activation = activation(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.conv1(x)))


class Bottleneck(nn.Module):
    """Residual block of a 1x1 convolution, a mixer and a 1x1 convolution, each with a normalization layer.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        mixer: name of the mixer.
        spec: arguments of the mixer; ``spec.channels`` is the width of the block, ``spec.stride`` its stride.
        se_ratio: squeeze-excitation: hidden over output channels; 0 for none.
        norm: factory of normalization layers.
        activation: factory of activation layers, called with ``inplace=True``.
        drop_path: probability of dropping the residual branch of an image in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        mixer: str,
        spec: MixerSpec,
        norm: NormLayer = nn.BatchNorm2d,
        activation: Callable[..., nn.Module] = nn.ReLU,
        se_ratio: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, spec.channels, 1, norm=norm)
        self.mixer = build_mixer(mixer, spec)
        self.norm2 = norm(self.mixer.out_channels)
        self.conv3 = ConvNorm(self.mixer.out_channels, out_channels, 1, norm=norm)
        self.se = SqueezeExcitation(out_channels, max(1, round(out_channels * se_ratio))) if se_ratio else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.shortcut = (
            ConvNorm(in_channels, out_channels, 1, stride=spec.stride, norm=norm)
            if spec.stride != 1 or in_channels != out_channels
            else nn.Identity()
        )
        self.activation = activation(inplace=True)
        # Zero-initialized branches make a deep network start as a shallow one. A frozen norm could never leave zero.
        weight = getattr(self.conv3.norm, "weight", None)
        if isinstance(weight, nn.Parameter):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.conv1(x))
        out = self.activation(self.norm2(self.mixer(out)))
        out = self.drop_path(self.se(self.conv3(out)))
        out += self.shortcut(x)
        return self.activation(out)


class StageEnd(nn.Module):
    """External attention on the output of a stage, followed by the activation."""

    def __init__(self, channels: int, slots: int, *, norm: NormLayer, activation: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.attention = ExternalAttention(channels, slots=slots, norm=norm)
        self.activation = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.attention(x))


class Head(nn.Module):
    """Optional 1x1 convolution, global average pooling, linear layer: (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        final_channels: int | None,
        *,
        norm: NormLayer,
        activation: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.final: nn.Module = nn.Identity()
        if final_channels is not None:
            self.final = nn.Sequential(ConvNorm(in_channels, final_channels, 1, norm=norm), activation(inplace=True))
        linear = nn.Linear(final_channels or in_channels, num_classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.linear: nn.Module = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.final(x).mean((-2, -1)))


@torch.fx.wrap  # a symbolic trace keeps the call: it depends on the number of dimensions and the device
def prepare_images(x: Tensor) -> Tensor:
    """Check that ``x`` is a batch of images, and on the CPU bring it to the channels-last format.

    Convolutions on the CPU are faster with channels last, and attention uses it too, so that no map is transposed.

    Raises:
        ValueError: ``x`` does not have four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"HaloNet expects images (B, C, H, W), got a tensor of shape {list(x.shape)}")
    return channels_last(x) if x.device.type == "cpu" else x


class HaloNet(nn.Module):
    """HaloNet: a ResNet in which halo attention replaces the 3x3 convolutions of some stages.

    The forward pass maps images (B, in_channels, H, W) of any size to a dict of the feature maps named in
    ``out_features``: ``stem`` and ``res2`` at stride 4, ``res3``, ``res4`` and ``res5`` at strides 8, 16 and 32 or at
    most ``output_stride``, each (B, channels, ceil(H / stride), ceil(W / stride)). With ``num_classes`` there is also
    ``linear``, the logits (B, num_classes).

    Args:
        variant: architecture, or its name in :data:`VARIANTS`.
        in_channels: number of image channels.
        norm: ``"BN"``, ``"FrozenBN"``, ``"SyncBN"``, ``"GN"``, or a factory called with a number of channels.
        out_features: names of the feature maps to return; stages after the last one named are not built.
        drop_path_rate: drop path probability of the last block, rising linearly from 0 at the first block.
        num_classes: number of classes of a classifier head; None for no head.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.
        mixer_options: options of mixers, by name of the mixer.
        use_act_checkpoint: stages whose activations are recomputed in the backward pass.
        output_stride: largest stride of the feature maps, 8, 16 or 32. Stages beyond it keep their resolution:
            convolutions are dilated instead, as in torchvision's ResNets, and attention has the same block and halo.

    Attributes:
        feature_channels: number of channels of every feature map.
        feature_strides: stride of every feature map.

    Raises:
        ValueError: an unknown name, or mixers, depths, heads or channels that do not match.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021 (arXiv
    2103.12731).
    """

    __jit_unused_properties__ = ["stages"]
    if TYPE_CHECKING:  # TorchScript does not know these types
        res2: Stage
        res3: Stage
        res4: Stage
        res5: Stage
    __constants__ = ("returns_logits",)  # with which TorchScript leaves out a head that does not exist

    def __init__(
        self,
        variant: HaloNetVariant | str,
        *,
        in_channels: int = 3,
        norm: str | NormLayer = "BN",
        out_features: Sequence[str] = STAGES,
        drop_path_rate: float = 0.0,
        num_classes: int | None = None,
        backend: str = "auto",
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        use_act_checkpoint: Sequence[str] = (),
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        variant = get_variant(variant) if isinstance(variant, str) else variant
        mixers = _mixers_per_block(variant)
        options = dict(mixer_options or {})
        features = ["stem", *STAGES, *(["linear"] if num_classes is not None else [])]
        if not out_features or not set(out_features) <= set(features):
            raise ValueError(f"out_features={list(out_features)} is invalid: expected one or more of {features}")
        if isinstance(norm, str) and norm not in NORMS:
            raise ValueError(f"norm={norm!r} is invalid: expected one of {', '.join(NORMS)}")
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate={drop_path_rate} is invalid: expected 0 to 1")
        if not 0 <= variant.se_ratio <= 1:
            raise ValueError(f"se_ratio={variant.se_ratio} is invalid: expected 0 to 1")
        if variant.activation not in ACTIVATIONS:
            raise ValueError(f"activation={variant.activation!r} is invalid: expected one of {', '.join(ACTIVATIONS)}")
        if not set(options) <= set(MIXERS):
            unknown = ", ".join(sorted(set(options) - set(MIXERS)))
            raise ValueError(f"mixer_options of {unknown} are invalid: expected mixers {', '.join(sorted(MIXERS))}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride} is invalid: expected 8, 16 or 32")
        check_stages(use_act_checkpoint, STAGES, "use_act_checkpoint")

        self.variant, self.num_classes = variant, num_classes
        self.out_features = tuple(out_features)
        self.returns_logits = "linear" in self.out_features
        norm_layer = NORMS[norm] if isinstance(norm, str) else norm
        activation = ACTIVATIONS[variant.activation]
        make_spec = functools.partial(
            MixerSpec,
            block_size=variant.block_size,
            halo_size=variant.halo_size,
            border=variant.border,
            backend=backend,
            norm=norm_layer,
            activation=activation,
        )

        self.stem = Stem(in_channels, variant.stem_channels, norm=norm_layer, activation=activation)
        channels, stride = variant.stem_channels, 4
        self.feature_channels, self.feature_strides = {"stem": channels}, {"stem": stride}
        last = max(len(STAGES) if f == "linear" else features.index(f) for f in out_features)
        total, index, dilation = sum(variant.depths), 0, 1
        for s in range(last):
            width = variant.base_width * 2**s
            out_channels = _whole(width * variant.bottleneck_ratio, "bottleneck_ratio", variant)
            value_channels = _whole(width * variant.value_ratio, "value_ratio", variant)
            blocks: list[nn.Module] = []
            stage_stride = 2 if s > 0 and 2 * stride <= output_stride else 1
            stage_dilation = 2 * dilation if s > 0 and stage_stride == 1 else dilation
            for mixer in mixers[s]:
                block_stride = 1 if blocks else stage_stride
                block = Bottleneck(
                    channels,
                    out_channels,
                    mixer=mixer,
                    spec=make_spec(
                        channels=width,
                        value_channels=value_channels,
                        stride=block_stride,
                        # The first block sees the map of the stage before it.
                        dilation=stage_dilation if blocks else dilation,
                        index=len(blocks),
                        num_heads=variant.num_heads[s],
                        options=options.get(mixer, {}),
                    ),
                    se_ratio=variant.se_ratio,
                    drop_path=drop_path_rate * index / max(1, total - 1),
                    norm=norm_layer,
                    activation=activation,
                )
                blocks.append(block)
                channels, stride, index = out_channels, stride * block_stride, index + 1
            dilation = stage_dilation
            if variant.external_slots[s]:
                blocks.append(StageEnd(channels, variant.external_slots[s], norm=norm_layer, activation=activation))
            self.add_module(STAGES[s], Stage(*blocks, use_act_checkpoint=STAGES[s] in use_act_checkpoint))
            self.feature_channels[STAGES[s]], self.feature_strides[STAGES[s]] = channels, stride
        if num_classes is not None:
            self.head = Head(channels, num_classes, variant.final_channels, norm=norm_layer, activation=activation)
            self.feature_channels["linear"], self.feature_strides["linear"] = num_classes, stride

    @property
    def stages(self) -> list[Stage]:
        """The stages that are built, in order."""
        return [getattr(self, name) for name in STAGES if hasattr(self, name)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, in_channels, H, W) to the feature maps named in ``out_features``."""
        x, maps = self._run_stages(x)
        if self.returns_logits:
            maps["linear"] = self.head(x)
        out: dict[str, Tensor] = {}
        for name in self.out_features:
            out[name] = maps[name]
        return out

    def _run_stages(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the last feature map, and all of them by name."""
        x = self.stem(prepare_images(x))
        maps = {"stem": x}
        # Not a loop: TorchScript needs the names of submodules. Stages that no feature needs do not exist.
        if hasattr(self, "res2"):
            x = self.res2(x)
            maps["res2"] = x
        if hasattr(self, "res3"):
            x = self.res3(x)
            maps["res3"] = x
        if hasattr(self, "res4"):
            x = self.res4(x)
            maps["res4"] = x
        if hasattr(self, "res5"):
            x = self.res5(x)
            maps["res5"] = x
        return x, maps


def _mixers_per_block(variant: HaloNetVariant) -> list[tuple[str, ...]]:
    """Return the names of the mixers of every block, by stage."""
    for name in ("depths", "mixers", "num_heads", "external_slots"):
        value = getattr(variant, name)
        if not isinstance(value, list | tuple) or len(value) != len(STAGES):
            raise ValueError(f"{name}={value!r} is invalid: expected {len(STAGES)} entries, one for each stage")
    for slots in variant.external_slots:
        check_integer("external_slots", slots, 0)
    mixers = []
    for stage, depth, mixer in zip(STAGES, variant.depths, variant.mixers, strict=True):
        if depth < 1:
            raise ValueError(f"depths={variant.depths} is invalid: {stage} needs at least one block")
        per_block = (mixer,) * depth if isinstance(mixer, str) else tuple(mixer)
        if len(per_block) != depth:
            raise ValueError(f"mixers={variant.mixers} is invalid: expected {depth} names for {stage}")
        mixers.append(per_block)
    return mixers


def _whole(channels: float, name: str, variant: HaloNetVariant) -> int:
    if channels != int(channels) or channels < 1:
        raise ValueError(
            f"{name}={getattr(variant, name)} with base_width={variant.base_width} is invalid: expected a positive "
            f"whole number of channels, got {channels}"
        )
    return int(channels)
