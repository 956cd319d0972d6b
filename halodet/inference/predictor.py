"""Inference with a trained detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halodet.checkpoint import classes_of, load_weights, read_weights
from halodet.config.validate import one_line
from halodet.data.classes import count_classes, read_classes
from halodet.data.transforms import ResizeShortestEdge
from halodet.errors import CheckpointError, ConfigError
from halodet.inference.as_bgr import ImageLike, PredictorError, as_bgr
from halodet.inference.detections import to_coco

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances
from omegaconf import DictConfig

__all__ = ["ImageLike", "Predictor", "PredictorError", "as_bgr", "to_coco"]

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

    def predict(self, original_image: ImageLike) -> dict[str, Any]:
        """Return all that the model predicts for an image, see :func:`as_bgr`; instances are on the CPU."""
        return self.predict_batch([original_image])[0]

    @torch.no_grad()
    def predict_batch(self, images: Sequence[ImageLike]) -> list[dict[str, Any]]:
        """Return what :meth:`predict` returns for each image, up to floating-point rounding.

        Images that have the same size after resizing share a call of the model. Others do not: the padding to a common
        size would change what is found near their borders.
        """
        inputs = [self.model_input(as_bgr(image)) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, entry in enumerate(inputs):
            groups.setdefault(tuple(entry["image"].shape), []).append(index)
        results: list[dict[str, Any]] = [{} for _ in inputs]
        for group in groups.values():
            for index, output in zip(group, self.model([inputs[index] for index in group]), strict=True):
                results[index] = dict(output)
                if "instances" in output:
                    results[index]["instances"] = output["instances"].to("cpu")
        return results

    def model_input(self, bgr: np.ndarray) -> dict[str, Any]:
        """Return an (H, W, 3) uint8 BGR image as the model takes it: resized, (3, H, W), in its channel order."""
        height, width = bgr.shape[:2]
        resized = T.AugInput(bgr[:, :, ::-1] if self.input_format == "RGB" else bgr)
        self.aug(resized)
        tensor = torch.as_tensor(resized.image.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}


def _resize(cfg: CfgNode) -> T.Augmentation:
    return ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def _lazy_augmentations(cfg: DictConfig) -> T.Augmentation:
    return T.AugmentationList(list(instantiate(cfg.dataloader.test.mapper.augmentations)))
