"""What a model offers to a checkpoint: the names and shapes of its tensors, and what else decides how weights fit it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from halodet.checkpoint.preprocessing import Preprocessing

from torch import nn

# Where a file's or a model's backbone lies: under FPN, or bare. "backbone.fpn_lateral2" is no part of it.
BACKBONE = re.compile(r"^backbone\.(bottom_up\.|(?=(stem|res\d|stages|final_conv|layer\d|conv1|bn1)\.))")
# Counters, and what old Detectron2 checkpoints keep although the config sets it: no part of what is learned.
NOT_WEIGHTS = re.compile(r"(^|\.)num_batches_tracked$|anchor_generator\.cell_anchors|^pixel_(mean|std)$")


@dataclass(frozen=True)
class ModelSpec:
    """A model as :func:`halodet.checkpoint.matching.match` sees it.

    Args:
        shapes: shape of every tensor of the state dict that is learned, by name, the backbone's first.
        backbone: what the names of the backbone's tensors begin with; empty for a model that is a backbone.
        kind: of the backbone, ``"halonet"``, ``"resnet"`` (Detectron2's) or ``"other"``.
        norm: of the backbone, ``"BN"``, ``"FrozenBN"`` or ``"GN"`` (also none, or another without statistics).
        stride_in_1x1: a ResNet's stages begin with a 1×1 convolution of stride 2 (not with a 3×3 one).
        windows: block and halo of every halo attention, in pixels, by what the names of its relative tables begin with.
        pixel_mean: of the input, by channel, in the order of ``input_format``; None where the model does not say.
        pixel_std: likewise.
        input_format: ``"RGB"`` or ``"BGR"``.
    """

    shapes: dict[str, tuple[int, ...]]
    backbone: str
    kind: str
    norm: str
    stride_in_1x1: bool
    windows: dict[str, tuple[int, int]]
    pixel_mean: tuple[float, ...] | None
    pixel_std: tuple[float, ...] | None
    input_format: str | None

    @classmethod
    def of(cls, model: nn.Module) -> ModelSpec:
        """The description of ``model``, which may be on any device; on ``meta`` it has no mean and deviation."""
        state = model.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items() if not NOT_WEIGHTS.search(name)}
        # Detectron2 has backbones with other names inside as well, such as backbone.net. of its ViTDet.
        other = "backbone." if any(name.startswith("backbone.") for name in shapes) else ""
        backbone = next((m[0] for m in map(BACKBONE.match, shapes) if m), other)
        # A backbone under FPN comes after the FPN's own layers in the model; people read from the input on.
        shapes = dict(sorted(shapes.items(), key=lambda item: not item[0].startswith(backbone)))
        norms = {name.rsplit(".", 1)[-1] for name in state if name.startswith(backbone)}
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
            norm="BN" if "num_batches_tracked" in norms else "FrozenBN" if "running_mean" in norms else "GN",
            stride_in_1x1=tuple(getattr(first, "stride", ())) == (2, 2),
            windows={
                f"{name}.pos_embed.": (module.block_size, module.halo_size)
                for name, module in modules.items()
                if hasattr(module, "pos_embed") and hasattr(module, "block_size") and hasattr(module, "halo_size")
            },
            pixel_mean=_three_numbers(getattr(model, "pixel_mean", None)),
            pixel_std=_three_numbers(getattr(model, "pixel_std", None)),
            input_format=getattr(model, "input_format", None),
        )

    @property
    def backbone_groups(self) -> set[str]:
        """The groups of modules (:func:`group_of`) that the backbone has."""
        return {group_of(name, self.backbone) for name in self.shapes if name.startswith(self.backbone)}

    @property
    def stem(self) -> str | None:
        """Name of the convolution that takes the image; None where none is known."""
        inside = (n for n, shape in self.shapes.items() if n.startswith(f"{self.backbone}stem.") and len(shape) == 4)
        return next(inside, None)

    @property
    def detector(self) -> bool:
        """Whether there is more than a backbone."""
        return bool(self.backbone)

    @property
    def convention(self) -> Preprocessing | None:
        """The pixels the model takes, where it says so."""
        if self.pixel_std is None or self.pixel_mean is None or sorted(self.input_format or "") != sorted("RGB"):
            return None
        return Preprocessing(self.input_format, self.pixel_mean, self.pixel_std)

    def block(self, name: str) -> str:
        """What the names in the same residual block as ``name`` begin with; the name itself outside of blocks."""
        inside = re.match(re.escape(self.backbone) + r"res\d\.\d+\.", name)
        return inside[0] if inside else name

    def has_attention(self, name: str) -> bool:
        """Whether ``name`` would lie in a HaloNet's block that has attention in the place of the 3×3 convolution."""
        return f"{self.block(name)}mixer.q.weight" in self.shapes


def group_of(name: str, backbone: str) -> str:
    """The group of modules a tensor is counted in: a stage of the backbone, the FPN, a head."""
    parts = name.removeprefix(backbone).split(".") if name.startswith(backbone) else name.split(".")
    if name.startswith(backbone):
        return ".".join(parts[:2]) if parts[0] == "stages" else parts[0]
    if parts[0] == "backbone":
        return "fpn"
    if parts[0] == "roi_heads":
        return f"roi_heads.{parts[1].split('_')[0]}"
    return parts[0]


def _three_numbers(buffer: object) -> tuple[float, ...] | None:
    return (
        None
        if buffer is None or buffer.is_meta or buffer.numel() != 3
        else tuple(round(v, 4) for v in buffer.flatten().tolist())
    )
