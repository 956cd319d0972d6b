"""Straightforward forms of all mixers, as their papers write them, with the weights of a mixer.

Each function takes a mixer of stride 1 and a map (B, C, H, W), and returns what the mixer returns. The work is in
matrix products, convolutions and ``einsum``, so that a counter of these counts the multiply-adds of the definition.
"""

from __future__ import annotations

from collections.abc import Callable

from halodet import mixers
from halodet.benchmark import plain_neighborhoods, plain_windows

from torch import Tensor

PLAIN_OPERATORS: dict[type[mixers.Mixer], Callable[..., Tensor]] = {
    mixers.BlockwiseMixer: plain_windows.blockwise,
    mixers.BoTNetMixer: plain_windows.botnet,
    mixers.ConvMixer: lambda mixer, x: mixer.conv(x),
    mixers.CsaMixer: plain_neighborhoods.csa,
    mixers.ElsaMixer: plain_neighborhoods.elsa,
    mixers.ExternalMixer: plain_neighborhoods.external,
    mixers.FocalMixer: plain_windows.focal,
    mixers.HaloMixer: plain_windows.halo,
    mixers.KeyOnlyMixer: plain_neighborhoods.key_only,
    mixers.LambdaMixer: plain_neighborhoods.lambda_layer,
    mixers.LesaMixer: plain_windows.lesa,
    mixers.NeighborhoodMixer: plain_neighborhoods.neighborhood,
    mixers.PlgMixer: plain_windows.plg,
    mixers.SlideMixer: plain_neighborhoods.slide,
}
