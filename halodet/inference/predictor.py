"""A detector with its trained weights, ready to be asked about one image at a time."""

from __future__ import annotations

import os
from typing import Any

from halodet.checkpoint import load_weights
from halodet.data.classes import read_classes
from halodet.data.transforms import ResizeShortestEdge
from halodet.errors import HalodetError

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

__all__ = ["Predictor", "PredictorError", "to_coco"]


class PredictorError(HalodetError, ValueError):
    """A model that cannot be used for prediction; the message is one sentence."""


class Predictor(DefaultPredictor):
    """Detectron2's predictor, which refuses to run with weights that are missing or fit only in part.

    ``classes`` holds the dataset id and name of each class in the order of the model's outputs (see ``read_classes``).

    ``allow_pickle`` reads pickle files that may run code.

    Raises:
        PredictorError: ``cfg.MODEL.WEIGHTS`` is empty or missing.
        CheckpointError: they are unreadable, or do not fill every parameter of the model.
        ClassesError: the class list beside the weights does not fit the model.
    """

    def __init__(self, cfg: CfgNode, *, allow_pickle: bool = False) -> None:
        weights = cfg.MODEL.WEIGHTS
        if not weights:
            raise PredictorError(
                "MODEL.WEIGHTS is empty; give the trained weights, for example MODEL.WEIGHTS output/model_final.pth."
            )
        if "://" not in weights and not os.path.isfile(weights):
            raise PredictorError(f"MODEL.WEIGHTS {weights} is not a file.")
        self.classes: list[dict[str, Any]] = read_classes(cfg)
        # DefaultPredictor only logs what a checkpoint leaves at random, so it is made without weights and they are loaded here.
        blank = cfg.clone()
        blank.defrost()
        blank.MODEL.WEIGHTS = ""
        super().__init__(blank)
        self.cfg.MODEL.WEIGHTS = weights
        self.aug = ResizeShortestEdge(self.aug.short_edge_length, self.aug.max_size)
        load_weights(self.model, weights, allow_pickle=allow_pickle)

    def __call__(self, original_image: np.ndarray) -> Instances:
        """Detect objects in one (H, W, 3) uint8 BGR image; the instances are on the CPU, in pixels of that image.

        Raises:
            PredictorError: the model is of a kind that returns no instances.
        """
        predictions = super().__call__(original_image)
        if "instances" not in predictions:
            raise PredictorError(
                f"MODEL.META_ARCHITECTURE {self.cfg.MODEL.META_ARCHITECTURE} returns no instances to draw."
            )
        return predictions["instances"].to("cpu")


def to_coco(instances: Instances, image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """Turn one image's predictions into COCO results: ``bbox`` as x, y, width, height in pixels, score, and masks as RLE text.

    ``category_ids[k]`` is the dataset's id of the model's class ``k``.

    Raises:
        IndexError: a predicted class has no entry in ``category_ids``.
    """
    results = instances_to_coco_json(instances.to("cpu"), image_id)
    for result in results:
        result["category_id"] = category_ids[result["category_id"]]
    return results
