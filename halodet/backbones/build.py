"""Builders of the backbones, registered under the names used in MODEL.BACKBONE.NAME."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from halodet.backbones.halonet import HaloNetBackbone
from halodet.backbones.timm_backbone import TimmBackbone
from halodet.errors import ConfigError

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

logger = logging.getLogger(__name__)

TIMM_BACKBONES = (
    "build_halodet_timm_backbone",
    "build_halodet_timm_fpn_backbone",
    "build_retinanet_halodet_timm_fpn_backbone",
)

# Keys that halodet's Trainer uses, with the values at which they have no effect.
_TRAINER_KEYS = {
    "SOLVER.OPTIMIZER_NAME": "SGD",
    "SOLVER.BACKBONE_LR_MULTIPLIER": 1.0,
    "SOLVER.LR_LAYER_DECAY": 1.0,
    "SOLVER.GRAD_ACCUM_STEPS": 1,
    "SOLVER.REFERENCE_IMS_PER_BATCH": 0,
    "MODEL.EMA.ENABLED": False,
    "MODEL.COMPILE": False,
    "INPUT.LSJ.ENABLED": False,
    "INPUT.COPY_PASTE.ENABLED": False,
}


def _register(builder: Callable[..., Backbone]) -> Callable[..., Backbone]:
    """Register a builder; a name that is taken stays as it is, unlike with Detectron2's own decorator, which raises."""
    name = builder.__name__
    if name not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(builder)
        return builder
    owner = BACKBONE_REGISTRY.get(name).__module__
    if owner != __name__:  # otherwise halodet is imported again
        logger.warning("MODEL.BACKBONE.NAME=%s is already registered by %s and is not halodet's", name, owner)
    return builder


@_register
def build_halonet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> HaloNetBackbone:
    """Build a HaloNet from MODEL.HALONET."""
    _check_keys(cfg, "HALONET")
    _warn_about_ignored_keys(cfg)
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0 and not cfg.MODEL.WEIGHTS:
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT %d freezes parts that are random until weights are loaded, and MODEL.WEIGHTS is "
            "empty. Fix: set it to 0, or give weights",
            cfg.MODEL.BACKBONE.FREEZE_AT,
        )
    return HaloNetBackbone(cfg, input_shape)


@_register
def build_halonet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a HaloNet with an FPN of levels p2 to p6, for the R-CNN family."""
    return _fpn(cfg, build_halonet_backbone(cfg, input_shape), LastLevelMaxPool())


@_register
def build_retinanet_halonet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a HaloNet with an FPN of levels p3 to p7, for RetinaNet."""
    return _retinanet_fpn(cfg, build_halonet_backbone(cfg, input_shape))


@_register
def build_halodet_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a timm network with attention from MODEL.HALODET_TIMM."""
    _check_keys(cfg, "HALODET_TIMM")
    _warn_about_ignored_keys(cfg)
    return TimmBackbone(cfg, input_shape)


@_register
def build_halodet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a timm network with attention and an FPN of levels p2 to p6, for the R-CNN family."""
    return _fpn(cfg, build_halodet_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@_register
def build_retinanet_halodet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a timm network with attention and an FPN of levels p3 to p7, for RetinaNet."""
    return _retinanet_fpn(cfg, build_halodet_timm_backbone(cfg, input_shape))


def _retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    res5 = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(res5, cfg.MODEL.FPN.OUT_CHANNELS))


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _check_keys(cfg: CfgNode, node: str) -> None:
    if node not in cfg.MODEL:
        raise ConfigError(
            f"The config has no MODEL.{node}. Fix: call halodet.add_halodet_config(cfg) after get_cfg(), before the "
            "config file is merged."
        )


def _warn_about_ignored_keys(cfg: CfgNode) -> None:
    """Warn once if Detectron2's DefaultTrainer builds the model: it would train with SGD whatever OPTIMIZER_NAME says.

    The backbone is the only code of halodet that such a run calls, so the trainer is found among its callers. A
    subclass with an optimizer of its own, such as halodet's Trainer, is none of those.
    """
    engine: Any = sys.modules.get("detectron2.engine.defaults")
    frame = sys._getframe(1) if engine else None
    while frame and frame.f_code is not engine.DefaultTrainer.build_model.__func__.__code__:
        frame = frame.f_back
    trainer = frame.f_locals["cls"] if frame else None
    if trainer is None or trainer.build_optimizer.__func__ is not engine.DefaultTrainer.build_optimizer.__func__:
        return
    ignored = [f"{key}={value}" for key, default in _TRAINER_KEYS.items() if (value := _get(cfg, key)) != default]
    if ignored:
        logger.warning("Detectron2's DefaultTrainer ignores %s. Fix: train with halodet.Trainer", ", ".join(ignored))


def _get(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)
