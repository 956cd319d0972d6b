"""Evaluation with test-time augmentation: each image at several sizes, and mirrored, merged by Detectron2."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from torch import nn


def check_tta(cfg: CfgNode, model: nn.Module) -> None:
    """Check that TEST.AUG can be used with ``model``, which may be on the device ``meta``.

    Raises:
        ValueError: it is asked for, and cannot; what to change.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    if not isinstance(model, GeneralizedRCNN):
        raise ValueError(
            f"TEST.AUG is for R-CNNs, and this model is a {type(model).__name__}: set TEST.AUG.ENABLED to False"
        )
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "TEST.AUG is neither for keypoints nor for precomputed proposals: set TEST.AUG.ENABLED to False"
        )
    sizes = cfg.TEST.AUG.MIN_SIZES
    if not sizes or min(sizes) < 1 or cfg.TEST.AUG.MAX_SIZE < max(sizes):
        raise ValueError(
            f"TEST.AUG.MIN_SIZES is {sizes} and MAX_SIZE {cfg.TEST.AUG.MAX_SIZE}, expected at least one size in pixels, none above MAX_SIZE"
        )


def evaluate_augmented(
    test: Callable[[nn.Module], Mapping[str, Any]], cfg: CfgNode, model: nn.Module
) -> OrderedDict[str, Any]:
    """What ``test`` finds of ``model`` under TEST.AUG, each name with ``_TTA`` at its end, as Detectron2's training tool has them.

    Args:
        test: evaluates a detector: bbox, segm -> metrics.
        cfg: the run's config.
        model: an R-CNN, or one in DistributedDataParallel.
    """
    return OrderedDict((f"{name}_TTA", result) for name, result in test(GeneralizedRCNNWithTTA(cfg, model)).items())
