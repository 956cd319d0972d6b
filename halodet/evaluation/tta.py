"""Evaluation with test-time augmentation: multiple scales and horizontal flip, merged by Detectron2."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from halodet.errors import ConfigError

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, PanopticFPN
from torch import nn


def check_tta(cfg: CfgNode, model: nn.Module) -> None:
    """Check that ``model``, which may be on the meta device, supports TEST.AUG.

    Raises:
        ConfigError: TEST.AUG.ENABLED is True and the model or another key does not support it.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    if not isinstance(model, GeneralizedRCNN) or isinstance(model, PanopticFPN):
        raise ConfigError(
            f"TEST.AUG.ENABLED=True is invalid: expected False with {type(model).__name__}, as only GeneralizedRCNN "
            "supports it."
        )
    if cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "TEST.AUG.ENABLED=True supports neither keypoints nor precomputed proposals. Fix: set it to False."
        )
    sizes = cfg.TEST.AUG.MIN_SIZES
    if not sizes or min(sizes) < 1 or cfg.TEST.AUG.MAX_SIZE < max(sizes):
        raise ConfigError(
            f"TEST.AUG.MIN_SIZES={sizes}, MAX_SIZE={cfg.TEST.AUG.MAX_SIZE} is invalid: expected one or more sizes in "
            "pixels, at most MAX_SIZE."
        )


def evaluate_augmented(
    test: Callable[[nn.Module], Mapping[str, Any]], cfg: CfgNode, model: nn.Module
) -> OrderedDict[str, Any]:
    """Evaluate ``model`` with TEST.AUG; result names get the suffix ``_TTA``, as in Detectron2's training tool.

    Args:
        test: evaluates a detector and returns its metrics by task ("bbox", "segm").
        cfg: config.
        model: an R-CNN, or one in DistributedDataParallel.
    """
    return OrderedDict((f"{name}_TTA", result) for name, result in test(GeneralizedRCNNWithTTA(cfg, model)).items())
