"""Inference with a trained detector, one image at a time."""

from __future__ import annotations

import os
from typing import Any

from halodet.checkpoint import classes_of, load_weights, read_weights
from halodet.config.validate import one_line
from halodet.data.classes import count_classes, read_classes
from halodet.data.transforms import ResizeShortestEdge
from halodet.errors import CheckpointError, ConfigError, HalodetError
from halodet.utils.image_io import read_image, to_bgr

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
from PIL import Image
from torch import Tensor

__all__ = ["ImageLike", "Predictor", "PredictorError", "as_bgr", "to_coco"]

_BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)


ImageLike = np.ndarray | Tensor | Image.Image | str | os.PathLike[str]


class PredictorError(HalodetError, TypeError):
    """An image has a shape or type that the predictor does not take."""


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

    def __call__(self, original_image: ImageLike) -> Instances:
        """Detect objects in an image; the instances are on the CPU, in pixels of that image.

        Args:
            original_image: see :func:`as_bgr`.

        Raises:
            ConfigError: the model returns no instances.
            PredictorError: the image has another shape or type.
            ImageError: a file cannot be read.
        """
        predictions = self.predict(original_image)
        if "instances" not in predictions:
            raise ConfigError(f"{type(self.model).__name__} is invalid: expected a model that detects instances.")
        return predictions["instances"]

    @torch.no_grad()
    def predict(self, original_image: ImageLike) -> dict[str, Any]:
        """Return all that the model predicts for an image, see :func:`as_bgr`; instances are on the CPU."""
        bgr = as_bgr(original_image)
        height, width = bgr.shape[:2]
        image = bgr[:, :, ::-1] if self.input_format == "RGB" else bgr
        resized = T.AugInput(image)
        self.aug(resized)
        tensor = torch.as_tensor(resized.image.astype("float32").transpose(2, 0, 1))
        predictions = dict(self.model([{"image": tensor, "height": height, "width": width}])[0])
        if "instances" in predictions:
            predictions["instances"] = predictions["instances"].to("cpu")
        return predictions


def as_bgr(image: ImageLike) -> np.ndarray:
    """Return an image as an (H, W, 3) uint8 BGR array.

    Args:
        image: a file name; a Pillow image; a uint8 array (H, W), (H, W, 1), (H, W, 3) BGR or (H, W, 4) BGRA, as OpenCV
            has them; or a uint8 tensor (1 or 3, H, W) RGB, as torchvision has them. Transparent pixels become white.

    Raises:
        PredictorError: another shape or type; names both.
        ImageError: the file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_bgr(image)
    array: Any = image
    if isinstance(image, Tensor):
        fits = image.ndim == 3 and len(image) in (1, 3)
        array = np.ascontiguousarray(image.detach().cpu().numpy()[::-1].transpose(1, 2, 0)) if fits else None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise _unexpected(image)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape[2] == 4:
        alpha = array[:, :, 3:].astype(np.float32) / 255
        return np.rint(array[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    if array.shape[2] not in (1, 3):
        raise _unexpected(image)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _unexpected(image: Any) -> PredictorError:
    kind = type(image).__name__
    found = f"{kind} of shape {tuple(image.shape)} and type {image.dtype}" if hasattr(image, "shape") else kind
    return PredictorError(
        f"Image is a {found}: expected uint8, an array (H, W), (H, W, 1), (H, W, 3) BGR or (H, W, 4) BGRA, a tensor "
        "(3, H, W) RGB, a Pillow image or a file name."
    )


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
