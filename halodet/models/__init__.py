"""HaloNet as a plain ``nn.Module``, its variants, and their registration with timm."""

from .variants import VARIANTS, HaloNetVariant

__all__ = ["VARIANTS", "HaloNetVariant"]
