"""Inference with a trained detector, one image at a time."""

from __future__ import annotations

from typing import Any

from halodet.checkpoint import classes_of, load_weights, read_weights
from halodet.config.validate import one_line
from halodet.data.classes import count_classes, read_classes
from halodet.data.transforms import ResizeShortestEdge
from halodet.errors import CheckpointError, ConfigError

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Instances
from omegaconf import DictConfig

__all__ = ["Predictor", "to_coco"]

_BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)


class Predictor(DefaultPredictor):
    """Detectron2's predictor, for which weights that are missing or incomplete are an error.

    Args:
        cfg: config of the detector, or a LazyConfig with ``model``, ``dataloader.test`` and ``train.init_checkpoint``.
        allow_pickle: whether to run code that pickle files hold.

    Attributes:
        aug: resizes an image as for evaluation.
        classes: dataset id and name of each class in the order of the model's outputs.
        stuff_classes: name of each class of its semantic segmentation; empty without one.

    Raises:
        CheckpointError: the weights are missing or unreadable, or do not provide all of the model.
        ConfigError: the model cannot be built.
        ClassesError: the class list beside the weights does not fit the model.
    """

    def __init__(self, cfg: CfgNode | DictConfig, *, allow_pickle: bool = False) -> None:
        lazy = isinstance(cfg, DictConfig)
        weights = cfg.train.init_checkpoint if lazy else cfg.MODEL.WEIGHTS
        key = "train.init_checkpoint=" if lazy else "MODEL.WEIGHTS "
        if not weights:
            raise CheckpointError(
                f"{key.rstrip('= ')} is empty: expected trained weights. Fix: add {key}output/model_final.pth."
            )
        self.cfg = cfg.copy() if lazy else cfg.clone()
        dataset = "" if lazy else next(iter(cfg.DATASETS.TEST), "")
        if dataset:
            self.metadata = MetadataCatalog.get(dataset)  # as DefaultPredictor has it
        self.stuff_classes = list(self.metadata.get("stuff_classes", ())) if dataset else []
        loaded = read_weights(weights, allow_pickle=allow_pickle)
        trained = classes_of(loaded.checkpoint)
        if trained is None or len(trained) != count_classes(cfg):
            trained = read_classes(cfg)
        self.classes: list[dict[str, Any]] = trained
        try:
            self.model = (instantiate(cfg.model).to(cfg.train.device) if lazy else build_model(self.cfg)).eval()
            self.aug = _lazy_augmentations(cfg) if lazy else _resize(cfg)
        except _BUILD_ERRORS as error:
            raise ConfigError(f"Cannot build the model of this config: {one_line(error)}") from error
        self.input_format = cfg.model.input_format if lazy else cfg.INPUT.FORMAT
        load_weights(self.model, weights, preloaded=loaded)

    def __call__(self, original_image: np.ndarray) -> Instances:
        """Detect objects in an (H, W, 3) uint8 BGR image; the instances are on the CPU, in pixels of that image.

        Raises:
            ConfigError: the model returns no instances.
        """
        predictions = self.predict(original_image)
        if "instances" not in predictions:
            raise ConfigError(f"{type(self.model).__name__} is invalid: expected a model that detects instances.")
        return predictions["instances"]

    @torch.no_grad()
    def predict(self, original_image: np.ndarray) -> dict[str, Any]:
        """Return all that the model predicts for an (H, W, 3) uint8 BGR image; instances are on the CPU."""
        height, width = original_image.shape[:2]
        image = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        resized = T.AugInput(image)
        self.aug(resized)
        tensor = torch.as_tensor(resized.image.astype("float32").transpose(2, 0, 1))
        predictions = dict(self.model([{"image": tensor, "height": height, "width": width}])[0])
        if "instances" in predictions:
            predictions["instances"] = predictions["instances"].to("cpu")
        return predictions


def _resize(cfg: CfgNode) -> T.Augmentation:
    return ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def _lazy_augmentations(cfg: DictConfig) -> T.Augmentation:
    return T.AugmentationList(list(instantiate(cfg.dataloader.test.mapper.augmentations)))


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
