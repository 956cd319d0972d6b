"""The mixers by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

MIXERS: dict[str, type[nn.Module]] = {}


@dataclass(frozen=True)
class MixerSpec:
    """What a bottleneck tells its mixer; each mixer takes what it needs of it."""

    channels: int  # of the input
    value_channels: int  # what an attention's values, and so its output, have
    stride: int
    num_heads: int
    block_size: int  # pixels
    halo_size: int  # pixels
    border: str
    backend: str = "auto"  # what computes attention


def register_mixer(name: str):
    """Class decorator: make a mixer known as ``name``."""

    def register(mixer: type[nn.Module]) -> type[nn.Module]:
        MIXERS[name] = mixer
        return mixer

    return register


def build_mixer(name: str, spec: MixerSpec) -> nn.Module:
    """The mixer called ``name``, made from ``spec``.

    Raises:
        ValueError: there is no mixer of that name.
    """
    if name not in MIXERS:
        raise ValueError(f"there is no mixer {name!r}: the mixers are {sorted(MIXERS)}")
    return MIXERS[name].from_spec(spec)
