"""Check that values of Detectron2's own keys are in range: it would stop on most of them in the middle of a run, or go on in silence."""

from __future__ import annotations

from functools import reduce
from operator import getitem
from typing import Any

from detectron2.config import CfgNode

_LEAST = {
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.REPEAT_THRESHOLD": 0,
    "INPUT.MIN_SIZE_TRAIN": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TEST": 0,  # no resizing
    "INPUT.MAX_SIZE_TEST": 1,
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.RETINANET.NUM_CLASSES": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.STEPS": 0,
    "SOLVER.BASE_LR": 0,
    "SOLVER.BASE_LR_END": 0,
    "SOLVER.GAMMA": 0,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.BIAS_LR_FACTOR": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.WEIGHT_DECAY_NORM": 0,
    "SOLVER.WEIGHT_DECAY_BIAS": 0,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WARMUP_FACTOR": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0,
    "TEST.EVAL_PERIOD": 0,  # only at the end
    "TEST.DETECTIONS_PER_IMAGE": -1,  # all
}
_CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
}
_NOT_EMPTY = ("INPUT.MIN_SIZE_TRAIN",)
_SEEDS = 2**31  # numpy's end at 2**32, and each process adds to it


def check_ranges(cfg: CfgNode) -> None:
    """Check numbers of Detectron2's keys against their least values, and names against those it knows.

    Raises:
        ValueError: one is out of range; the message is one sentence that names the key.
    """
    for key, least in _LEAST.items():
        value = _value(cfg, key)
        numbers = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        if key in _NOT_EMPTY and not numbers:
            raise ValueError(f"{key} is {value}, expected at least one number")
        if not all(isinstance(number, (int, float)) and least <= number < float("inf") for number in numbers):
            raise ValueError(f"{key} is {value}, expected {least} or more")
    for key, known in _CHOICES.items():
        if _value(cfg, key) not in known:
            raise ValueError(f"{key} is {_value(cfg, key)!r}, expected one of {', '.join(known)}")
    if cfg.SEED >= _SEEDS:
        raise ValueError(f"SEED is {cfg.SEED}, expected less than {_SEEDS}, or a number below 0 for one that is drawn")
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and not cfg.DATALOADER.REPEAT_THRESHOLD:
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN is RepeatFactorTrainingSampler and REPEAT_THRESHOLD 0.0, with which nothing is repeated: "
            "set it to the share of images below which a class is rare, such as 0.001"
        )


def _value(cfg: CfgNode, key: str) -> Any:
    return reduce(getitem, key.split("."), cfg)
