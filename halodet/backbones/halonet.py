"""HaloNet as a Detectron2 backbone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from halodet.models import HaloNet, HaloNetVariant, get_variant

from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone


class HaloNetBackbone(HaloNet, Backbone):
    """:class:`HaloNet` as a Detectron2 backbone, with Detectron2's normalization layers and freezing.

    Args:
        variant: architecture, or its name in :data:`halodet.models.VARIANTS`.
        norm: ``"BN"``, ``"FrozenBN"``, ``"SyncBN"`` or ``"GN"``.
        freeze_at: number of frozen parts: 0 none, 1 the stem, 2 the stem and res2, ... 5 all.
        **kwargs: further arguments of :class:`HaloNet`.

    Raises:
        ValueError: as :class:`HaloNet`.
    """

    @configurable
    def __init__(self, variant: HaloNetVariant | str, *, norm: str = "BN", freeze_at: int = 0, **kwargs: Any) -> None:
        detectron2_norm = functools.partial(get_norm, norm) if norm in ("BN", "FrozenBN", "SyncBN") else norm
        super().__init__(variant, norm=detectron2_norm, **kwargs)
        self._out_features = list(self.out_features)
        self._out_feature_channels, self._out_feature_strides = self.feature_channels, self.feature_strides
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        node = cfg.MODEL.HALONET
        fields = [field.name for field in dataclasses.fields(HaloNetVariant) if field.name.upper() in node]
        overrides = {name: node[name.upper()] for name in fields if node[name.upper()] is not None}
        return {
            "variant": get_variant(node.VARIANT, **overrides),
            "in_channels": input_shape.channels,
            "norm": node.NORM,
            "out_features": node.OUT_FEATURES,
            "drop_path_rate": node.DROP_PATH_RATE,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "backend": node.BACKEND,
            "mixer_options": node.MIXER_OPTIONS,
            "use_act_checkpoint": node.USE_ACT_CHECKPOINT,
            "output_stride": node.OUTPUT_STRIDE,
        }

    def freeze(self, freeze_at: int = 0) -> HaloNetBackbone:
        """Freeze the first ``freeze_at`` parts (stem, res2, ...); their batch norms become FrozenBatchNorm2d."""
        for part in [self.stem, *self.stages][: max(0, freeze_at)]:
            part.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(part)
        return self
