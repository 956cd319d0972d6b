"""The networks as data: H0…H7, detection hybrids (ResNet-SE with attention in the last stage) and their baselines.

H0…H7: block size b, halo h, value ratio r_v, bottleneck ratio r_b, blocks in stage 3 (l3) and final width d_f are the columns of the
H family as keras_cv_attention_models lists it; the parameter counts it gives come out of them. For detection they stand here with
convolutions in stages 1 and 2 and attention in stages 3 and 4; the all-attention form is ``mixers=("halo",) * 4``. Where the sources
disagree or are silent (activation, border, squeeze-excitation inside attention blocks) the value here is this project's choice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HaloNetVariant:
    """The shape of a HaloNet.

    Stage s (0 to 3) has width ``w = base_width * 2**s``: its blocks are 1×1 to w, mixer (attention: values of ``w * value_ratio``),
    1×1 to ``w * bottleneck_ratio``.
    """

    depths: tuple[int, int, int, int]  # blocks per stage
    mixers: tuple[str | tuple[str, ...], ...] = (
        "conv",
        "conv",
        "halo",
        "halo",
    )  # per stage: a name, or a name for each block
    block_size: int = 8
    halo_size: int = 3
    value_ratio: float = 1.0
    bottleneck_ratio: float = 4.0
    num_heads: tuple[int, int, int, int] = (4, 8, 8, 8)
    final_channels: int | None = None  # of the 1×1 before the pooling of the classifier form
    base_width: int = 64
    stem_channels: int = 64
    se_ratio: float = 0.0  # squeeze-excitation: hidden over output channels of a block; 0: none
    activation: str = "relu"
    border: str = "mask"


def _h(b: int, h: int, r_v: float, r_b: float, l3: int, d_f: int | None) -> HaloNetVariant:
    return HaloNetVariant(
        (3, 3, l3, 3), block_size=b, halo_size=h, value_ratio=r_v, bottleneck_ratio=r_b, final_channels=d_f
    )


def _se(depths: tuple[int, int, int, int], b: int, h: int, last: str) -> HaloNetVariant:
    return HaloNetVariant(depths, ("conv", "conv", "conv", last), block_size=b, halo_size=h, se_ratio=1 / 16)


_R50, _R101 = (3, 4, 6, 3), (3, 4, 23, 3)

VARIANTS: dict[str, HaloNetVariant] = {
    #          b  h  r_v  r_b   l3  d_f
    "H0": _h(8, 3, 1.0, 0.5, 7, None),
    "H1": _h(8, 3, 1.0, 1.0, 10, None),
    "H2": _h(8, 3, 1.0, 1.25, 11, None),
    "H3": _h(10, 3, 1.0, 1.5, 12, 1024),
    "H4": _h(12, 2, 1.0, 3.0, 12, 1280),
    "H5": _h(14, 2, 2.5, 2.0, 23, 1536),
    "H6": _h(8, 4, 3.0, 2.75, 24, 1536),
    "H7": _h(10, 3, 4.0, 3.5, 26, 2048),
    "R50-SE": _se(_R50, 8, 3, "conv"),
    "R50-SE-halo-b8h3": _se(_R50, 8, 3, "halo"),
    "R50-SE-halo-b32h3": _se(_R50, 32, 3, "halo"),
    "R101-SE": _se(_R101, 8, 3, "conv"),
    "R101-SE-halo-b8h3": _se(_R101, 8, 3, "halo"),
    "R101-SE-halo-b32h3": _se(_R101, 32, 3, "halo"),
}
