"""Register a user's COCO json files, and check that the datasets of a config exist."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halodet.config.lazy import flatten
from halodet.data.build import check_records, wrap_dataset_errors
from halodet.data.coco import ValidatedCoco, match_categories, register_validated, restore_parent, validate_coco
from halodet.data.coco_records import register_cleaned
from halodet.data.yolo_voc import is_yolo_or_voc
from halodet.errors import ConfigError, DatasetError

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

USER_DATASETS = ("user_train", "user_val")


def prepare_datasets(cfg: CfgNode, *, train: bool = True) -> None:
    """Check that all datasets of the config exist, and draw halodet's synthetic ones if needed.

    Args:
        cfg: config.
        train: also check DATASETS.TRAIN, which an evaluation does not need.

    Raises:
        ConfigError: a dataset name is unknown, or its files are missing.
        DatasetError: a test dataset cannot be read, which Detectron2 would find at the first evaluation only.
    """
    key, flag = ("TRAIN", "train") if train else ("TEST", "val")
    if not cfg.DATASETS[key]:
        raise ConfigError(
            f"DATASETS.{key} is empty. Fix: set it to a dataset name, or give --{flag}-json and --{flag}-images."
        )
    for name in dict.fromkeys((*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST)):
        prepare_dataset(name, read=name in cfg.DATASETS.TEST and name not in USER_DATASETS)


def prepare_dataset(name: str, *, read: bool) -> None:
    """Check that a dataset and its files exist, and draw it if it is a synthetic one of halodet and needed.

    Args:
        name: name of the dataset.
        read: also read it and check its structure.

    Raises:
        ConfigError: the name is unknown, or its files are missing.
        DatasetError: it cannot be read.
    """
    _check_registered(name)
    if name.startswith("halodet_shapes_"):
        try:
            DatasetCatalog.get(name)
        except (ValueError, OSError) as error:  # the folder is not writable or contains other files
            raise ConfigError(str(error)) from error
        return
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if path is not None and not os.path.exists(path):
            raise ConfigError(
                f"dataset {name!r}: {os.path.abspath(path)} does not exist. Fix: put the files there, or set "
                "DETECTRON2_DATASETS to the folder that contains coco/ (see datasets/README.md)."
            )
    if read:
        with wrap_dataset_errors(name):
            check_records(name, DatasetCatalog.get(name))


def _check_registered(name: str) -> None:
    if name in DatasetCatalog.list():
        return
    if name in USER_DATASETS:
        flag = f"--{name.removeprefix('user_')}-json"
        raise ConfigError(f"dataset {name!r} is user data of an earlier run. Fix: give its {flag} again.")
    close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise ConfigError(f"dataset {name!r} is not registered.{hint}")


@dataclass(frozen=True)
class UserData:
    """What a config must know of a user's COCO json files.

    Attributes:
        json_file: the first of them.
        names: dataset name of each split that was given, ``"train"`` and ``"val"``.
        class_names: names of the classes.
        keypoint_names: names of the keypoints; empty without keypoints.
        has_rle: whether the training data has masks in run-length encoding.
    """

    json_file: Path
    names: dict[str, str]
    class_names: list[str]
    keypoint_names: list[str]
    has_rle: bool


def validate_user_data(
    output_dir: str,
    train_json: str | None,
    train_images: str | None,
    val_json: str | None,
    val_images: str | None,
    *,
    need_masks: bool = True,
    crowds_as_objects: bool = False,
    classes: Sequence[Mapping[str, Any]] | None = None,
) -> UserData:
    """Validate a user's COCO json files and register their valid part.

    The files are not changed; the valid part is written to ``output_dir``/data. Each issue is logged on one line.

    Args:
        output_dir: output folder of the run.
        train_json: COCO json, YOLO data.yaml or folder of VOC xml files to train on; an evaluation needs none.
        train_images: folder that its file names are relative to; not required for YOLO and VOC.
        val_json: COCO json, YOLO data.yaml or folder of VOC xml files to evaluate on.
        val_images: folder that its file names are relative to; not required for YOLO and VOC.
        need_masks: skip annotations without a valid mask.
        crowds_as_objects: treat annotations with iscrowd=1 as single objects.
        classes: classes ``{"id": int, "name": str}`` of the weights to evaluate, with which those of the json files are
            matched by name; without them the validation data's are matched with the training data's.

    Raises:
        ConfigError: a json is given without its images or the reverse.
        DatasetError: a json cannot be used.
    """
    validated: dict[str, ValidatedCoco] = {}
    for split, json_file, images in (("train", train_json, train_images), ("val", val_json, val_images)):
        if bool(json_file) != bool(images) and not (json_file and is_yolo_or_voc(json_file)):
            raise ConfigError(f"--{split}-json and --{split}-images must be given together.")
        if json_file:
            validated[split] = validate_coco(
                json_file,
                images,
                split=split,
                need_masks=need_masks,
                require_annotations=split == "train",
                evaluation=split == "val",
                crowds_as_objects=crowds_as_objects,
            )
            for line in validated[split].issue_lines():
                logger.warning("%s", line)
    if len(validated) == 2:
        validated["train"] = restore_parent(validated["train"], validated["val"])
    known, source = classes, "the weights"
    if not known and "train" in validated:
        known, source = validated["train"].dataset["categories"], str(train_json)
    if known:
        validated = {split: match_categories(checked, known, source) for split, checked in validated.items()}
    for line in (note for checked in validated.values() for note in checked.notes):
        logger.info("%s", line)
    names = {split: name for split, name in zip(("train", "val"), USER_DATASETS, strict=True) if split in validated}
    for split, checked in validated.items():
        register_validated(names[split], checked, _cleaned_json(output_dir, names[split]))
    if "val" not in validated:
        logger.warning("No --val-json given: the model will not be evaluated.")
    train = validated["train"].dataset["annotations"] if "train" in validated else ()
    has_rle = any(isinstance(annotation.get("segmentation"), dict) for annotation in train)
    first = next(iter(validated.values()))
    logger.info("%d classes: %s", len(first.class_names), ", ".join(first.class_names))
    return UserData(first.json_file, names, first.class_names, first.keypoint_names, has_rle)


def register_user_data(
    cfg: CfgNode,
    *files: str | None,
    crowds_as_objects: bool = False,
    classes: Sequence[Mapping[str, Any]] | None = None,
) -> CfgNode:
    """Register a user's COCO json files with :func:`validate_user_data`, and adapt the config to them.

    Args:
        cfg: config.
        files: ``train_json``, ``train_images``, ``val_json`` and ``val_images``.
        crowds_as_objects: see :func:`validate_user_data`.
        classes: see :func:`validate_user_data`.

    Returns:
        The config with DATASETS, the number of classes and INPUT.MASK_FORMAT set.

    Raises:
        ConfigError: a json is given without its images or the reverse.
        DatasetError: a json cannot be used.
    """
    data = validate_user_data(
        cfg.OUTPUT_DIR, *files, need_masks=cfg.MODEL.MASK_ON, crowds_as_objects=crowds_as_objects, classes=classes
    )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (
        (data.names[split],) if split in data.names else () for split in ("train", "val")
    )
    if data.has_rle:
        cfg.INPUT.MASK_FORMAT = "bitmask"  # accepts polygons too; Detectron2's default does not accept RLE
    if cfg.MODEL.KEYPOINT_ON:
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS if "val" in data.names else None
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = _count_keypoints(data, "TEST.KEYPOINT_OKS_SIGMAS", sigmas)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(data.class_names)
    cfg.freeze()
    return cfg


def set_lazy_user_data(cfg: DictConfig, data: UserData) -> None:
    """Adapt a LazyConfig in place to the result of :func:`validate_user_data`, as :func:`register_user_data` does.

    Set are the ``names`` of ``dataloader.train`` and ``dataloader.test``, every ``num_classes`` of the model outside a
    semantic head, ``num_keypoints`` and ``instance_mask_format``. Without validation data the evaluator is removed.
    """

    def update(root: str, name: str, value: Any) -> None:
        for key, old in flatten(OmegaConf.select(cfg, root, default=OmegaConf.create())).items():
            parts = key.split(".")
            if name in parts and not old.startswith("${"):
                OmegaConf.update(cfg, ".".join([root, *parts[: parts.index(name) + 1]]), value)

    for split, root in (("train", "dataloader.train"), ("val", "dataloader.test")):
        if split in data.names:
            update(root, "names", data.names[split])
    if "val" in data.names:
        update("dataloader.evaluator", "dataset_name", data.names["val"])
    else:
        cfg.dataloader.pop("evaluator", None)
    if data.has_rle:
        update("dataloader.train", "instance_mask_format", "bitmask")
    for head in ("roi_heads", "head"):
        update(f"model.{head}", "num_classes", len(data.class_names))
    if "num_classes" in cfg.model:  # RetinaNet
        cfg.model.num_classes = len(data.class_names)
    if OmegaConf.select(cfg, "model.roi_heads.keypoint_head") is not None:
        key = "dataloader.evaluator.kpt_oks_sigmas"
        sigmas = OmegaConf.select(cfg, key, default=()) if "val" in data.names else None
        update("model.roi_heads", "num_keypoints", _count_keypoints(data, key, sigmas))


def _count_keypoints(data: UserData, key: str, sigmas: Sequence[float] | None) -> int:
    """Return the number of keypoints; check that an evaluation, if there is one, has the scale of each."""
    count = len(data.keypoint_names)
    if not count:
        raise DatasetError(
            f"{data.json_file} has no keypoints: a keypoint head expects 'keypoints', a list of names, in its "
            "categories."
        )
    if sigmas is not None and len(sigmas or range(17)) != count:  # pycocotools has those of COCO's 17 keypoints
        raise ConfigError(
            f"{key}={list(sigmas)} is invalid: expected {count} numbers, one for each keypoint of {data.json_file}."
        )
    return count


def register_user_data_again(output_dir: str, names: Iterable[str]) -> None:
    """Register the files written by :func:`validate_user_data` in another process.

    Args:
        output_dir: output folder of the run.
        names: names of the datasets of the config.
    """
    for name in USER_DATASETS:
        if name in names and name not in DatasetCatalog.list():
            register_cleaned(name, _cleaned_json(output_dir, name))


def user_data_files(output_dir: str, names: Iterable[str]) -> list[Path]:
    """Return the files that :func:`validate_user_data` writes for the datasets among ``names``."""
    return [_cleaned_json(output_dir, name) for name in USER_DATASETS if name in names]


def _cleaned_json(output_dir: str, name: str) -> Path:
    return Path(output_dir) / "data" / f"{name}.json"
