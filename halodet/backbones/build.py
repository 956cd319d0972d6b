"""Builders of the backbones, registered under the names used in MODEL.BACKBONE.NAME."""

from __future__ import annotations

from halodet.backbones.halonet import HaloNetBackbone
from halodet.backbones.timm_backbone import TimmBackbone

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

TIMM_BACKBONES = ("build_timm_backbone", "build_timm_fpn_backbone", "build_retinanet_timm_fpn_backbone")


@BACKBONE_REGISTRY.register()
def build_halonet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> HaloNetBackbone:
    """Build a HaloNet from MODEL.HALONET."""
    return HaloNetBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_halonet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a HaloNet with an FPN of levels p2 to p6, for the R-CNN family."""
    return _fpn(cfg, build_halonet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_halonet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a HaloNet with an FPN of levels p3 to p7, for RetinaNet."""
    return _retinanet_fpn(cfg, build_halonet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a timm network with attention from MODEL.TIMM."""
    return TimmBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a timm network with attention and an FPN of levels p2 to p6, for the R-CNN family."""
    return _fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a timm network with attention and an FPN of levels p3 to p7, for RetinaNet."""
    return _retinanet_fpn(cfg, build_timm_backbone(cfg, input_shape))


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
