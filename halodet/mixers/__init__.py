"""Mixers: the operators between the two 1x1 convolutions of a bottleneck block.

A mixer maps (B, channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)) for any H and W. To add one,
subclass :class:`Mixer` and decorate the class with :func:`register_mixer`; nothing else has to be changed.
"""

from halodet.mixers.blockwise import BlockwiseMixer
from halodet.mixers.botnet import BoTNetMixer
from halodet.mixers.conv import ConvMixer
from halodet.mixers.csa import CsaMixer
from halodet.mixers.elsa import ElsaMixer
from halodet.mixers.external import ExternalAttention, ExternalMixer
from halodet.mixers.focal import FocalMixer
from halodet.mixers.halo import HaloMixer
from halodet.mixers.key_only import KeyOnlyMixer
from halodet.mixers.lambda_layer import LambdaMixer
from halodet.mixers.lesa import LesaMixer
from halodet.mixers.neighborhood import NeighborhoodMixer
from halodet.mixers.plg import PlgMixer
from halodet.mixers.registry import MIXERS, Mixer, MixerSpec, build_mixer, register_mixer
from halodet.mixers.slide import SlideMixer

__all__ = [
    "MIXERS",
    "BlockwiseMixer",
    "BoTNetMixer",
    "ConvMixer",
    "CsaMixer",
    "ElsaMixer",
    "ExternalAttention",
    "ExternalMixer",
    "FocalMixer",
    "HaloMixer",
    "KeyOnlyMixer",
    "LambdaMixer",
    "LesaMixer",
    "Mixer",
    "MixerSpec",
    "NeighborhoodMixer",
    "PlgMixer",
    "SlideMixer",
    "build_mixer",
    "register_mixer",
]
