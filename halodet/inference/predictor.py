"""Inference with a trained detector, one image at a time."""

from __future__ import annotations

from typing import Any

from halodet.checkpoint import load_weights, read_weights
from halodet.config.validate import one_line
from halodet.data.classes import read_classes
from halodet.data.transforms import ResizeShortestEdge
from halodet.errors import CheckpointError, ConfigError

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

__all__ = ["Predictor", "to_coco"]


class Predictor(DefaultPredictor):
    """Detectron2's predictor, for which weights that are missing or incomplete are an error.

    Args:
        cfg: config of the detector.
        allow_pickle: whether to run code that pickle files hold.

    Attributes:
        aug: resizes an image as for evaluation.
        classes: dataset id and name of each class in the order of the model's outputs.

    Raises:
        CheckpointError: ``cfg.MODEL.WEIGHTS`` is empty, unreadable, or does not provide all of the model.
        ConfigError: the model cannot be built.
        ClassesError: the class list beside the weights does not fit the model.
    """

    aug: ResizeShortestEdge

    def __init__(self, cfg: CfgNode, *, allow_pickle: bool = False) -> None:
        weights = cfg.MODEL.WEIGHTS
        if not weights:
            raise CheckpointError(
                "MODEL.WEIGHTS is empty: expected trained weights. Fix: add MODEL.WEIGHTS output/model_final.pth."
            )
        self.classes: list[dict[str, Any]] = read_classes(cfg)
        loaded = read_weights(weights, allow_pickle=allow_pickle)
        # DefaultPredictor only logs what a checkpoint does not provide, so it gets no weights.
        blank = cfg.clone()
        blank.defrost()
        blank.MODEL.WEIGHTS = ""
        try:
            super().__init__(blank)
        except (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"Cannot build the model of this config: {one_line(error)}") from error
        self.cfg.MODEL.WEIGHTS = weights
        self.aug = ResizeShortestEdge(self.aug.short_edge_length, self.aug.max_size)
        load_weights(self.model, weights, preloaded=loaded)

    def __call__(self, original_image: np.ndarray) -> Instances:
        """Detect objects in an (H, W, 3) uint8 BGR image; the instances are on the CPU, in pixels of that image.

        Raises:
            ConfigError: the model returns no instances.
        """
        predictions = super().__call__(original_image)
        if "instances" not in predictions:
            raise ConfigError(
                f"MODEL.META_ARCHITECTURE={self.cfg.MODEL.META_ARCHITECTURE} is invalid: expected a model that detects "
                "instances."
            )
        return predictions["instances"].to("cpu")


def to_coco(instances: Instances, image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """Convert the predictions of one image to COCO results.

    Args:
        instances: predictions of one image.
        image_id: id of the image.
        category_ids: dataset id of each class of the model.

    Returns:
        Dicts with ``bbox`` (x, y, width, height in pixels), ``score``, ``category_id`` and ``segmentation`` (RLE).
    """
    results = instances_to_coco_json(instances.to("cpu"), image_id)
    for result in results:
        result["category_id"] = category_ids[result["category_id"]]
    return results
