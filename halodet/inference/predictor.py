"""Inference with a trained detector."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halodet.checkpoint import classes_of, load_weights, read_weights
from halodet.config.lazy import is_lazy_config, load_lazy_config, set_score_threshold
from halodet.config.load import load_config
from halodet.config.projects import AddConfig
from halodet.config.validate import one_line
from halodet.data.classes import count_classes, read_classes
from halodet.data.transforms import ResizeShortestEdge
from halodet.errors import CheckpointError, ConfigError
from halodet.inference.as_bgr import ImageLike, PredictorError, as_bgr
from halodet.inference.base_predictor import BasePredictor
from halodet.inference.detections import to_coco
from halodet.inference.export_metadata import SUFFIXES

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.modeling import PanopticFPN, build_model
from omegaconf import DictConfig

__all__ = ["ImageLike", "Predictor", "PredictorError", "as_bgr", "to_coco"]

_CHECKPOINTS = (".pth", ".pt", ".pkl", ".safetensors")
_BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)


class Predictor(BasePredictor, DefaultPredictor):
    """Detectron2's predictor, for which weights that are missing or incomplete are an error.

    Calling it with an image returns a :class:`~halodet.inference.Result`; :meth:`predict` returns what Detectron2's
    predictor returns.

    Args:
        cfg: config of the detector, or a LazyConfig with ``model``, ``dataloader.test`` and ``train.init_checkpoint``.
        allow_pickle: whether to run code that pickle files hold.

    Attributes:
        aug: resizes an image as for evaluation.
        classes: dataset id and name of each class in the order of the model's outputs.
        stuff_classes: name of each class of its semantic segmentation; empty without one.
        panoptic: arguments of :func:`~halodet.inference.postprocessing.combine_panoptic`; None without panoptic
            segments.

    Raises:
        CheckpointError: the weights are missing or unreadable, or do not provide all of the model.
        ConfigError: the model cannot be built.
        ClassesError: the class list beside the weights does not fit the model.
    """

    def __init__(self, cfg: CfgNode | DictConfig, *, allow_pickle: bool = False) -> None:
        if isinstance(cfg, str | os.PathLike):
            raise ConfigError(f"{os.fspath(cfg)} is no config. Fix: Predictor.from_pretrained({os.fspath(cfg)!r}).")
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
        if isinstance(self.model, PanopticFPN):
            self.panoptic = {
                "overlap_threshold": self.model.combine_overlap_thresh,
                "stuff_area_limit": self.model.combine_stuff_area_thresh,
                "instances_confidence_threshold": self.model.combine_instances_score_thresh,
            }
        load_weights(self.model, weights, preloaded=loaded)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        device: str | int | torch.device | None = "auto",
        *,
        score_threshold: float | None = 0.5,
        opts: Sequence[str] = (),
        add_configs: Iterable[AddConfig] = (),
        allow_pickle: bool = False,
        allow_unsafe_config: bool = False,
    ) -> Predictor:
        """Load a trained detector.

        Args:
            source: the ``OUTPUT_DIR`` of a run, of which the latest checkpoint is loaded, or a config file.
            weights: checkpoint; by default that of the run, or the one that the config names.
            device: ``"auto"`` for the GPU if there is one, ``"cpu"``, ``"cuda"``, ``"cuda:N"``, N or a device of
                PyTorch; None for that of the config.
            score_threshold: minimum score of detections, from 0 to 1; None for that of the config.
            opts: overrides of the config, as on the command line.
            add_configs: functions of other projects that add their keys to a YAML config.
            allow_pickle: whether to run code that pickle files hold.
            allow_unsafe_config: whether to run code that a YAML config holds, as that of a run with a LazyConfig.

        Raises:
            ConfigError: the config or an argument is invalid.
            CheckpointError: the weights are missing or unreadable, or do not provide all of the model.
        """
        is_number = isinstance(score_threshold, numbers.Real)
        if score_threshold is not None and not (is_number and 0 <= score_threshold <= 1):
            raise ConfigError(f"score_threshold={score_threshold!r} is invalid: expected a number from 0 to 1.")
        if isinstance(opts, str | Mapping):
            raise ConfigError(
                f"opts={opts!r} is invalid: expected a list, such as ['TEST.DETECTIONS_PER_IMAGE', '50']."
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device is not None:
            device = f"cuda:{device}" if isinstance(device, int) else str(device)
        config_file = os.fspath(source)
        if os.path.isdir(source):
            config_file = os.path.join(config_file, "config.yaml")
            if not os.path.isfile(config_file):
                raise ConfigError(f"{os.fspath(source)} has no config.yaml: expected the OUTPUT_DIR of a run.")
            weights = _latest_weights(Path(source)) if weights is None else weights
        elif config_file.endswith(tuple(SUFFIXES.values())):
            raise ConfigError(f"{config_file} is an exported model. Fix: ExportedPredictor({config_file!r}).")
        elif config_file.endswith(_CHECKPOINTS):
            folder = os.path.dirname(config_file) or "."
            raise ConfigError(
                f"{config_file} is a checkpoint: expected a config or the OUTPUT_DIR of a run. "
                f"Fix: give {folder}, or a config with these weights."
            )
        cfg: Any
        if is_lazy_config(config_file):
            given = {"train.device": device, "train.init_checkpoint": weights}
            changes = [f"{key}={value}" for key, value in given.items() if value is not None]
            cfg = load_lazy_config(config_file, [*changes, *opts], allow_unsafe=allow_unsafe_config)
            if score_threshold is not None:
                set_score_threshold(cfg, score_threshold)
        else:
            given = {"MODEL.DEVICE": device, "MODEL.WEIGHTS": weights}
            changes = [word for key, value in given.items() if value is not None for word in (key, os.fspath(value))]
            cfg = load_config(
                config_file, [*changes, *opts], train=False, add_configs=add_configs, allow_unsafe=allow_unsafe_config
            ).clone()
            folder = os.path.dirname(config_file) or "."
            if not cfg.MODEL.WEIGHTS and os.path.isfile(os.path.join(folder, "model_final.pth")):
                raise CheckpointError(
                    f"MODEL.WEIGHTS is empty: expected trained weights. Fix: give the folder {folder} in place of "
                    f"{config_file}."
                )
            cfg.defrost()
            if score_threshold is not None:
                cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = score_threshold
                cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = score_threshold
        return cls(cfg, allow_pickle=allow_pickle)

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


def _latest_weights(folder: Path) -> str:
    """Return the checkpoint that ``last_checkpoint`` names, or ``model_final.pth``."""
    tag = folder / "last_checkpoint"
    named = folder / tag.read_text(encoding="utf-8").strip() if tag.is_file() else folder
    for file in (named, folder / "model_final.pth"):
        if file.is_file():
            return str(file)
    raise CheckpointError(f"{folder} has no model_final.pth. Fix: give the weights of another folder.")
