"""What may stand between the two 1×1 convolutions of a bottleneck.

A mixer is a module that turns (B, channels, H, W) into (B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉) for any H and W. A new one is one file
here: a class with an ``out_channels`` and a ``from_spec``, registered under a name. Every file of this package is imported below.
"""

import importlib
import pkgutil

from halodet.mixers.registry import MIXERS, MixerSpec, build_mixer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MIXERS", "MixerSpec", "build_mixer"]
