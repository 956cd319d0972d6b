"""Backbones for Detectron2; importing this package registers them."""

from .builders import (
    build_halonet_backbone,
    build_halonet_fpn_backbone,
    build_retinanet_halonet_fpn_backbone,
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from .halonet import HaloNet
from .timm import TimmBackbone
from .variants import VARIANTS, HaloNetVariant

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
