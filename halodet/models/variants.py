"""Variants of HaloNet: H0 to H7, detection hybrids (ResNet-SE with attention in the last stage), their baselines, and
ResNet-50 with each mixer.

The columns of H0 to H7 (block size b, halo size h, value ratio r_v, bottleneck ratio r_b, blocks in stage 3 l3, final
width d_f) are those of keras_cv_attention_models and give its parameter counts. The rows here are the detection form,
with convolutions in stages 1 and 2 and attention in stages 3 and 4; ``mixers=("halo",) * 4`` is the all-attention form.
Where sources disagree or say nothing (activation, border, squeeze-excitation in attention blocks) the value is this
project's choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HaloNetVariant:
    """Architecture of a HaloNet.

    Stage s (0 to 3) has width ``w = base_width * 2**s``. Its blocks are a 1x1 convolution to w channels, a mixer
    (attention values have ``w * value_ratio`` channels) and a 1x1 convolution to ``w * bottleneck_ratio`` channels.

    Args:
        depths: number of blocks in each stage.
        mixers: mixer of each stage: a name, or one name for each block.
        block_size: side of an attention block in pixels.
        halo_size: width of the halo around a block in pixels.
        value_ratio: number of value channels over the width of the stage.
        bottleneck_ratio: number of output channels of a block over the width of the stage.
        num_heads: number of attention heads in each stage.
        final_channels: number of channels of the 1x1 convolution before the pooling of a classifier; None for none.
        base_width: width of the first stage.
        stem_channels: number of output channels of the stem.
        se_ratio: squeeze-excitation: hidden over output channels of a block; 0 for none.
        activation: ``"relu"`` or ``"silu"``.
        border: border of halo attention, ``"mask"`` or ``"zero"``.
        external_slots: number of memory slots of an :class:`ExternalAttention` at the end of each stage; 0 for none.
    """

    depths: tuple[int, int, int, int]
    mixers: tuple[str | tuple[str, ...], ...] = ("conv", "conv", "halo", "halo")
    block_size: int = 8
    halo_size: int = 3
    value_ratio: float = 1.0
    bottleneck_ratio: float = 4.0
    num_heads: tuple[int, int, int, int] = (4, 8, 8, 8)
    final_channels: int | None = None
    base_width: int = 64
    stem_channels: int = 64
    se_ratio: float = 0.0
    activation: str = "relu"
    border: str = "mask"
    external_slots: tuple[int, int, int, int] = (0, 0, 0, 0)


def _h(b: int, h: int, r_v: float, r_b: float, l3: int, d_f: int | None) -> HaloNetVariant:
    return HaloNetVariant(
        (3, 3, l3, 3), block_size=b, halo_size=h, value_ratio=r_v, bottleneck_ratio=r_b, final_channels=d_f
    )


def _se(depths: tuple[int, int, int, int], b: int, h: int, last: str) -> HaloNetVariant:
    return HaloNetVariant(depths, ("conv", "conv", "conv", last), block_size=b, halo_size=h, se_ratio=1 / 16)


def _r50(res4: str | tuple[str, ...], res5: str | tuple[str, ...], **fields: Any) -> HaloNetVariant:
    return HaloNetVariant(_R50, ("conv", "conv", res4, res5), **fields)


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
    # A mixer in the last two stages; botnet and lesa where their authors place them in a ResNet.
    "R50-blockwise": _r50("blockwise", "blockwise"),
    "R50-botnet": _r50("conv", "botnet", num_heads=(4, 4, 4, 4)),
    "R50-csa": _r50("csa", "csa"),
    "R50-elsa": _r50("elsa", "elsa"),
    "R50-external": _r50("conv", "conv", external_slots=(0, 0, 0, 64)),
    "R50-focal": _r50("focal", "focal"),
    "R50-halo": _r50("halo", "halo"),
    "R50-key_only": _r50("key_only", "key_only"),
    "R50-lambda": _r50("lambda", "lambda"),
    "R50-lesa": _r50(("conv",) + ("lesa",) * 5, "lesa"),
    "R50-neighborhood": _r50("neighborhood", "neighborhood"),
    "R50-plg": _r50("plg", "plg"),
    "R50-slide": _r50("slide", "slide"),
}


def get_variant(name: str, **overrides: Any) -> HaloNetVariant:
    """Return the row ``name`` of :data:`VARIANTS` with fields replaced; lists become tuples.

    Raises:
        ValueError: there is no such variant.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant={name!r} is invalid: expected one of {', '.join(VARIANTS)}")
    return dataclasses.replace(VARIANTS[name], **{field: _to_tuple(value) for field, value in overrides.items()})


def _to_tuple(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):  # OmegaConf's lists are no list
        return tuple(_to_tuple(item) for item in value)
    return value
