"""Check the types of config values, also inside sequences and of values that are None by default.

yacs compares the outermost type with that of the default only, and lets None replace any value.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from halodet.config.keys import default_values, invalid, leaf_values
from halodet.models.variants import VARIANTS

from detectron2.config import CfgNode

# Examples of what may replace a default that is empty, None or of a narrower type.
_EXAMPLES: dict[str, Any] = {
    "DATASETS.PROPOSAL_FILES_TEST": ("",),
    "DATASETS.PROPOSAL_FILES_TRAIN": ("",),
    "DATASETS.TEST": ("",),
    "DATASETS.TRAIN": ("",),
    "MODEL.ANCHOR_GENERATOR.ANGLES": [[0.0]],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32.0]],
    "MODEL.FPN.IN_FEATURES": ["res2"],
    "MODEL.HALODET_TIMM.USE_ACT_CHECKPOINT": ["res2"],
    "MODEL.HALONET.USE_ACT_CHECKPOINT": ["res2"],
    "MODEL.TF32": True,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.1],
}
_OPTIONAL = ("SOLVER.WEIGHT_DECAY_NORM",)  # None: SOLVER.WEIGHT_DECAY
_UNTYPED = ("MODEL.HALONET.MIXERS", "TEST.EXPECTED_RESULTS")  # several types; checked elsewhere
_NAMES = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


@functools.cache
def _examples() -> dict[str, Any]:
    variant = dataclasses.asdict(VARIANTS["H4"])
    halonet = {f"MODEL.HALONET.{name.upper()}": value for name, value in variant.items()}
    known = {**default_values(), **_EXAMPLES}
    return {key: halonet.get(key, value) for key, value in known.items() if key not in _UNTYPED}


def check_types(cfg: CfgNode) -> None:
    """Check the types of the values of Detectron2's and halodet's keys.

    Raises:
        ConfigError: a value is of another type than the default; integers are accepted as floats.
    """
    values, defaults, examples = leaf_values(cfg), default_values(), _examples()
    for key in values.keys() & examples.keys():
        value = values[key]
        optional = defaults[key] is None or key in _OPTIONAL
        if not _is_like(value, examples[key]) and not (value is None and optional):
            raise invalid(key, value, _describe(examples[key]))


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, (list, tuple)):
        return isinstance(value, (list, tuple)) and all(_is_like(v, example[0]) and v not in ([], ()) for v in value)
    if isinstance(example, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(example)


def _describe(example: Any) -> str:
    return f"a sequence such as {example}" if isinstance(example, (list, tuple)) else _NAMES[type(example)]
