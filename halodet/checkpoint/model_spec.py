"""Description of a model for matching: names and shapes of its tensors, and what else decides how weights fit it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halodet.checkpoint.preprocessing import Preprocessing
from halodet.mixers import Mixer

from torch import nn

# Prefix of a backbone in a file or a model, under FPN or bare. "backbone.fpn_lateral2" is not part of it.
BACKBONE = re.compile(r"^backbone\.(bottom_up\.|(?=(stem|res\d|stages|final_conv|layer\d|conv1|bn1)\.))")
# Counters, and constants that old Detectron2 checkpoints hold although the config sets them.
NOT_WEIGHTS = re.compile(r"(^|\.)num_batches_tracked$|anchor_generator\.cell_anchors|^pixel_(mean|std)$")
CLASSES = "halodet_classes"  # attribute of a model with its classes, for its checkpoints


@dataclass(frozen=True)
class ModelSpec:
    """A model as :func:`halodet.checkpoint.matching.match` sees it.

    Args:
        shapes: shape of every learned tensor of the state dict by name, the backbone's first.
        backbone: prefix of the names of the backbone's tensors; empty for a model that is a backbone.
        kind: ``"halonet"``, ``"resnet"`` (Detectron2's) or ``"other"``.
        norm: norm layers of the backbone, ``"BN"``, ``"FrozenBN"`` or ``"GN"`` (any without statistics).
        stride_in_1x1: whether the stages of a ResNet have their stride in the first 1x1 convolution, not in the 3x3
            one.
        tables: mixer that owns each relative position table, by name of the table.
        replaced: prefixes of HaloNet blocks in which a mixer other than the 3x3 convolution is used.
        pixel_mean: mean of the input by channel, in the order of ``input_format``; None if unknown.
        pixel_std: standard deviation of the input, likewise.
        input_format: ``"RGB"`` or ``"BGR"``; None if unknown.
        classes: classes ``{"id": dataset id, "name": name}`` in the order of the outputs; None if unknown.
    """

    shapes: dict[str, tuple[int, ...]]
    backbone: str
    kind: str
    norm: str
    stride_in_1x1: bool
    tables: Mapping[str, Mixer]
    replaced: tuple[str, ...]
    pixel_mean: tuple[float, ...] | None
    pixel_std: tuple[float, ...] | None
    input_format: str | None
    classes: Sequence[Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> ModelSpec:
        """Describe ``model``. On the meta device it has no mean and standard deviation."""
        state = model.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items() if not NOT_WEIGHTS.search(name)}
        # Detectron2 has backbones with other names inside, such as backbone.net. of its ViTDet.
        default = "backbone." if any(name.startswith("backbone.") for name in shapes) else ""
        backbone = next((m[0] for m in map(BACKBONE.match, shapes) if m), default)
        # In the model, a backbone comes after the FPN that uses it.
        shapes = dict(sorted(shapes.items(), key=lambda item: not item[0].startswith(backbone)))
        buffers = {name.rsplit(".", 1)[-1] for name in state if name.startswith(backbone)}
        kinds = {"stem.conv1.conv.weight": "halonet", "stem.conv1.weight": "resnet"}
        kind = next((kinds[name] for name in kinds if backbone + name in shapes), "other")
        if kind == "halonet" and backbone + "res2.0.conv1.conv.weight" not in shapes:
            kind = "other"  # timm's stems have that name too
        modules = dict(model.named_modules())
        first = modules.get(f"{backbone}res3.0.conv1")
        return cls(
            shapes=shapes,
            backbone=backbone,
            kind=kind,
            norm="BN" if "num_batches_tracked" in buffers else "FrozenBN" if "running_mean" in buffers else "GN",
            stride_in_1x1=tuple(getattr(first, "stride", ())) == (2, 2),
            tables={
                f"{name}.{table}": module
                for name, module in modules.items()
                if isinstance(module, Mixer)
                for table in module.rel_pos_tables
            },
            replaced=tuple(
                name.removesuffix("mixer")
                for name, module in modules.items()
                if re.search(r"(^|\.)res\d\.\d+\.mixer$", name)
                and not _has_3x3(module, shapes.get(f"{name}.conv.weight", ()))
            ),
            pixel_mean=_three_numbers(getattr(model, "pixel_mean", None)),
            pixel_std=_three_numbers(getattr(model, "pixel_std", None)),
            input_format=getattr(model, "input_format", None),
            classes=getattr(model, CLASSES, None),
        )

    @property
    def backbone_groups(self) -> set[str]:
        """Groups of modules (:func:`group_of`) of the backbone."""
        return {group_of(name, self.backbone) for name in self.shapes if name.startswith(self.backbone)}

    @property
    def stem(self) -> str | None:
        """Name of the first convolution; None if unknown."""
        inside = (n for n, shape in self.shapes.items() if n.startswith(f"{self.backbone}stem.") and len(shape) == 4)
        return next(inside, None)

    @property
    def detector(self) -> bool:
        """Whether the model is more than a backbone."""
        return bool(self.backbone)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Preprocessing of the model's input; None if unknown."""
        if self.pixel_std is None or self.pixel_mean is None or sorted(self.input_format or "") != sorted("RGB"):
            return None
        return Preprocessing(self.input_format, self.pixel_mean, self.pixel_std)

    def in_replaced_mixer(self, name: str) -> bool:
        """Return whether ``name`` is in, or normalizes, a mixer that is used instead of the 3x3 convolution."""
        return name.startswith(tuple(f"{block}{part}." for block in self.replaced for part in ("mixer", "norm2")))


def group_of(name: str, backbone: str) -> str:
    """Return the group of modules that a tensor is counted in: a stage of the backbone, the FPN or a head."""
    parts = name.removeprefix(backbone).split(".") if name.startswith(backbone) else name.split(".")
    if name.startswith(backbone):
        return ".".join(parts[:2]) if parts[0] == "stages" else parts[0]
    if parts[0] == "backbone":
        return "fpn"
    if parts[0] == "roi_heads":
        return f"roi_heads.{parts[1].split('_')[0]}"
    return parts[0]


def _has_3x3(mixer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a mixer takes the 3x3 weights of a ResNet; ``shape`` is that of its ``conv.weight``."""
    return not getattr(mixer, "is_attention", True) and shape[:1] * 2 + (3, 3) == shape


def _three_numbers(buffer: object) -> tuple[float, ...] | None:
    if buffer is None or buffer.is_meta or buffer.numel() != 3:
        return None
    return tuple(round(value, 4) for value in buffer.flatten().tolist())
