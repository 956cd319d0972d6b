"""Backbones for Detectron2; importing this package registers them."""

from halodet.backbones.build import (
    build_halonet_backbone,
    build_halonet_fpn_backbone,
    build_retinanet_halonet_fpn_backbone,
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from halodet.backbones.halonet import HaloNet
from halodet.backbones.timm_backbone import TimmBackbone
from halodet.models.variants import VARIANTS, HaloNetVariant

__all__ = [
    "VARIANTS",
    "HaloNet",
    "HaloNetVariant",
    "TimmBackbone",
    "build_halonet_backbone",
    "build_halonet_fpn_backbone",
    "build_retinanet_halonet_fpn_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
