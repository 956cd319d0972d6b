"""HaloNet as a plain ``nn.Module`` and its variants; :mod:`halodet.models.timm_models` registers them with timm."""

from halodet.models.halonet import STAGES, HaloNet
from halodet.models.variants import VARIANTS, HaloNetVariant, get_variant

__all__ = ["STAGES", "VARIANTS", "HaloNet", "HaloNetVariant", "get_variant"]
