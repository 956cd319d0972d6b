"""HaloNet as a Detectron2 backbone: stem, bottleneck, stages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from halodet.mixers import MixerSpec, build_mixer
from halodet.models.act_checkpoint import check_stages, run_stage
from halodet.models.variants import VARIANTS, HaloNetVariant

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
NORMS = ("BN", "FrozenBN", "SyncBN", "GN")
STAGES = ("res2", "res3", "res4", "res5")


def build_norm(name: str, channels: int) -> nn.Module:
    """Detectron2's normalisation ``name``; GN takes fewer groups where 32 do not divide the channels (80 and 176 in H2 and H6)."""
    if name == "GN":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return get_norm(name, channels)


class ConvNorm(nn.Sequential):
    """A convolution without bias, and its normalisation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, norm: str) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv", conv)
        self.add_module("norm", build_norm(norm, out_channels))


class Stem(CNNBlockBase):
    """7×7 convolution of stride 2, then 3×3 max-pool of stride 2: (B, in_channels, H, W) -> (B, channels, ⌈H/4⌉, ⌈W/4⌉)."""

    def __init__(self, in_channels: int, channels: int, *, norm: str, activation: str) -> None:
        super().__init__(in_channels, channels, stride=4)
        self.conv1 = ConvNorm(in_channels, channels, 7, stride=2, norm=norm)
        self.activation = ACTIVATIONS[activation](inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.conv1(x)))


class Bottleneck(CNNBlockBase):
    """Residual block 1×1, mixer, 1×1, each with its normalisation: (B, in_channels, H, W) -> (B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    Args:
        in_channels: of the input.
        out_channels: of the output.
        mixer: name of what stands between the two 1×1 convolutions.
        spec: what it is made from; its ``channels`` are the width of the block, its ``stride`` the block's.
        se_ratio: hidden over output channels of a squeeze-excitation before the addition; 0 for none.
        norm: Detectron2's name of a normalisation.
        activation: ``"relu"`` or ``"silu"``.
        drop_path: probability of dropping the branch for an image while training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        mixer: str,
        spec: MixerSpec,
        se_ratio: float = 0.0,
        norm: str = "BN",
        activation: str = "relu",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(in_channels, out_channels, spec.stride)
        self.conv1 = ConvNorm(in_channels, spec.channels, 1, norm=norm)
        self.mixer = build_mixer(mixer, spec)
        self.norm2 = build_norm(norm, self.mixer.out_channels)
        self.conv3 = ConvNorm(self.mixer.out_channels, out_channels, 1, norm=norm)
        self.se = SqueezeExcitation(out_channels, max(1, round(out_channels * se_ratio))) if se_ratio else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.shortcut = (
            ConvNorm(in_channels, out_channels, 1, stride=spec.stride, norm=norm)
            if spec.stride != 1 or in_channels != out_channels
            else nn.Identity()
        )
        self.activation = ACTIVATIONS[activation](inplace=True)
        # A branch that starts at zero makes deep networks start as shallow ones. FrozenBN could never leave it, so it keeps its ones.
        if isinstance(getattr(self.conv3.norm, "weight", None), nn.Parameter):
            nn.init.zeros_(self.conv3.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.conv1(x))
        out = self.activation(self.norm2(self.mixer(out)))
        out = self.drop_path(self.se(self.conv3(out)))
        out += self.shortcut(x)
        return self.activation(out)


class HaloNet(Backbone):
    """HaloNet: a ResNet in which halo attention stands in for the 3×3 convolutions of some stages.

    As a backbone it takes images (B, in_channels, H, W) of any size and returns the maps named in ``out_features``: ``stem`` and ``res2``
    at stride 4, ``res3``, ``res4``, ``res5`` at strides 8, 16, 32, each (B, channels, ⌈H/stride⌉, ⌈W/stride⌉). As a classifier
    (``num_classes``) it also has ``linear``, the logits (B, num_classes).

    Args:
        variant: the shape of the network, or its name in :data:`VARIANTS`.
        in_channels: of the images.
        norm: ``"BN"``, ``"FrozenBN"``, ``"SyncBN"`` or ``"GN"``.
        out_features: names of the maps to return; stages beyond the last one named are not built.
        drop_path_rate: probability of dropping the last block's branch while training, rising linearly from 0 at the first block.
        freeze_at: stages kept from training: 0 none, 1 the stem, 2 the stem and res2, ... 5 all.
        num_classes: make the classifier form, with the variant's final 1×1, pooling and a linear layer.
        backend: what computes attention, see :func:`halodet.attention.halo_attention`.
        use_act_checkpoint: stages whose activations are computed again in the backward pass instead of being kept.

    Raises:
        ValueError: an unknown name, or mixers, depths or heads that do not fit together.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021 (arXiv 2103.12731).
    """

    @configurable
    def __init__(
        self,
        variant: HaloNetVariant | str,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] = STAGES,
        drop_path_rate: float = 0.0,
        freeze_at: int = 0,
        num_classes: int | None = None,
        backend: str = "auto",
        use_act_checkpoint: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(variant, str):
            variant = get_variant(variant)
        mixers = _mixers_per_block(variant)
        known = ("stem", *STAGES, *(["linear"] if num_classes is not None else []))
        if not out_features or not set(out_features) <= set(known):
            raise ValueError(
                f"out_features are {list(out_features)}, expected at least one of {list(known)} and nothing else"
            )
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, expected one of {list(NORMS)}")
        if not 0 <= drop_path_rate <= 1 or not 0 <= variant.se_ratio <= 1:
            raise ValueError(f"drop_path_rate is {drop_path_rate} and se_ratio {variant.se_ratio}, expected 0 to 1")
        if variant.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {variant.activation!r}, expected one of {sorted(ACTIVATIONS)}")
        check_stages(use_act_checkpoint, STAGES, "use_act_checkpoint")

        self.variant, self.num_classes, self.use_act_checkpoint = variant, num_classes, tuple(use_act_checkpoint)
        self.stem = Stem(in_channels, variant.stem_channels, norm=norm, activation=variant.activation)
        channels, stride = variant.stem_channels, 4
        self._out_feature_strides, self._out_feature_channels = {"stem": stride}, {"stem": channels}
        self._out_features = list(out_features)

        last = (
            len(STAGES)
            if "linear" in out_features
            else max((STAGES.index(f) + 1 for f in out_features if f in STAGES), default=0)
        )
        self.stages: list[nn.Sequential] = []
        first_block = 0
        for s in range(last):
            width = variant.base_width * 2**s
            stage_channels = _whole(width * variant.bottleneck_ratio, "bottleneck_ratio", variant)
            blocks = []
            for index, mixer in enumerate(mixers[s]):
                spec = MixerSpec(
                    channels=width,
                    value_channels=_whole(width * variant.value_ratio, "value_ratio", variant),
                    stride=2 if s > 0 and index == 0 else 1,
                    num_heads=variant.num_heads[s],
                    block_size=variant.block_size,
                    halo_size=variant.halo_size,
                    border=variant.border,
                    backend=backend,
                )
                blocks.append(
                    Bottleneck(
                        channels,
                        stage_channels,
                        mixer=mixer,
                        spec=spec,
                        se_ratio=variant.se_ratio,
                        norm=norm,
                        activation=variant.activation,
                        drop_path=drop_path_rate * (first_block + index) / max(1, sum(variant.depths) - 1),
                    )
                )
                channels = stage_channels
            first_block += len(blocks)
            stride *= blocks[0].stride
            self.add_module(STAGES[s], nn.Sequential(*blocks))
            self.stages.append(getattr(self, STAGES[s]))
            self._out_feature_strides[STAGES[s]], self._out_feature_channels[STAGES[s]] = stride, channels

        if num_classes is not None:
            self.head = Head(channels, num_classes, variant.final_channels, norm=norm, activation=variant.activation)
            self._out_feature_strides["linear"], self._out_feature_channels["linear"] = stride, num_classes
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.HALONET
        overrides = {f.name: node[f.name.upper()] for f in dataclasses.fields(HaloNetVariant) if f.name.upper() in node}
        overrides = {name: _tupled(value) for name, value in overrides.items() if value is not None}
        return {
            "variant": dataclasses.replace(get_variant(node.VARIANT), **overrides),
            "in_channels": input_shape.channels,
            "norm": node.NORM,
            "out_features": node.OUT_FEATURES,
            "drop_path_rate": node.DROP_PATH_RATE,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "backend": node.BACKEND,
            "use_act_checkpoint": node.USE_ACT_CHECKPOINT,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, in_channels, H, W) -> the maps named in ``out_features``."""
        if x.dim() != 4:
            raise ValueError(f"HaloNet takes images (B, C, H, W), got a tensor of shape {tuple(x.shape)}")
        if x.device.type == "cpu":
            # Convolutions there are faster with channels last, and attention works with them: nothing is turned over between the two.
            x = x.contiguous(memory_format=torch.channels_last)
        maps = {"stem": self.stem(x)}
        x = maps["stem"]
        for name, stage in zip(STAGES, self.stages, strict=False):
            x = maps[name] = run_stage(stage, x, recompute=name in self.use_act_checkpoint)
        if "linear" in self._out_features:
            maps["linear"] = self.head(x)
        return {name: maps[name] for name in self._out_features}

    def freeze(self, freeze_at: int = 0) -> HaloNet:
        """Keep the stem (``freeze_at`` ≥ 1) and stages 2 … ``freeze_at`` from training, with their batch norms frozen."""
        if freeze_at >= 1:
            self.stem.freeze()
        for index, stage in enumerate(self.stages, start=2):
            if freeze_at >= index:
                for block in stage:
                    block.freeze()
        return self


class Head(nn.Module):
    """Classifier: optional 1×1 with normalisation, global average pool, linear: (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(
        self, in_channels: int, num_classes: int, final_channels: int | None, *, norm: str, activation: str
    ) -> None:
        super().__init__()
        self.final = nn.Identity()
        if final_channels is not None:
            self.final = nn.Sequential(
                ConvNorm(in_channels, final_channels, 1, norm=norm), ACTIVATIONS[activation](inplace=True)
            )
        self.linear = nn.Linear(final_channels or in_channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.final(x).mean((-2, -1)))


def get_variant(name: str) -> HaloNetVariant:
    """The row ``name`` of :data:`VARIANTS`; ValueError, with the names there are, if there is none."""
    if name not in VARIANTS:
        raise ValueError(f"there is no HaloNet variant {name!r}: the variants are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def _mixers_per_block(variant: HaloNetVariant) -> list[tuple[str, ...]]:
    for name in ("depths", "mixers", "num_heads"):
        value = getattr(variant, name)
        if not isinstance(value, list | tuple) or len(value) != len(STAGES):
            raise ValueError(f"{name} is {value!r}, expected {len(STAGES)} entries, one for each stage")
    mixers = []
    for stage, depth, mixer in zip(STAGES, variant.depths, variant.mixers, strict=True):
        if depth < 1:
            raise ValueError(f"depths are {variant.depths}: stage {stage} needs at least one block")
        per_block = (mixer,) * depth if isinstance(mixer, str) else tuple(mixer)
        if len(per_block) != depth:
            raise ValueError(f"mixers of {stage} are {per_block}, {len(per_block)} names for {depth} blocks")
        mixers.append(per_block)
    return mixers


def _whole(channels: float, name: str, variant: HaloNetVariant) -> int:
    if channels != int(channels) or channels < 1:
        ratio = getattr(variant, name)
        raise ValueError(
            f"{name} {ratio} with base_width {variant.base_width} gives {channels} channels: not a whole number"
        )
    return int(channels)


def _tupled(value: object) -> object:
    """Lists of a config file as the tuples of the table."""
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value
