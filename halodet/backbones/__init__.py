"""Detectron2 backbones; importing this package registers them in ``BACKBONE_REGISTRY``."""

from halodet.backbones.build import (
    build_halodet_timm_backbone,
    build_halodet_timm_fpn_backbone,
    build_halonet_backbone,
    build_halonet_fpn_backbone,
    build_retinanet_halodet_timm_fpn_backbone,
    build_retinanet_halonet_fpn_backbone,
)
from halodet.backbones.halonet import HaloNetBackbone
from halodet.backbones.timm_backbone import TimmBackbone

__all__ = [
    "HaloNetBackbone",
    "TimmBackbone",
    "build_halonet_backbone",
    "build_halonet_fpn_backbone",
    "build_retinanet_halonet_fpn_backbone",
    "build_retinanet_halodet_timm_fpn_backbone",
    "build_halodet_timm_backbone",
    "build_halodet_timm_fpn_backbone",
]
