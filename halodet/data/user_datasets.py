"""Register a user's COCO json files, and check that the datasets of a config exist."""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path

from halodet.data.build import check_records, wrap_dataset_errors
from halodet.data.coco import ValidatedCoco, check_same_categories, register_cleaned, register_validated, validate_coco
from halodet.errors import ConfigError, DatasetError

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

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


def register_user_data(
    cfg: CfgNode, train_json: str | None, train_images: str | None, val_json: str | None, val_images: str | None
) -> CfgNode:
    """Validate a user's COCO json files, register their valid part, and adapt the config to it.

    The files are not changed; the valid part is written to OUTPUT_DIR/data. Each issue is logged on one line.

    Args:
        cfg: config.
        train_json: COCO json to train on; an evaluation needs none.
        train_images: folder that its file names are relative to.
        val_json: COCO json to evaluate on.
        val_images: folder that its file names are relative to.

    Returns:
        The config with DATASETS, the number of classes and INPUT.MASK_FORMAT set.

    Raises:
        ConfigError: a json is given without its images or the reverse.
        DatasetError: a json cannot be used.
    """
    validated: dict[str, ValidatedCoco] = {}
    for split, json_file, images in (("train", train_json, train_images), ("val", val_json, val_images)):
        if bool(json_file) != bool(images):
            raise ConfigError(f"--{split}-json and --{split}-images must be given together.")
        if json_file:
            validated[split] = validate_coco(
                json_file, images, need_masks=cfg.MODEL.MASK_ON, require_annotations=split == "train"
            )
            for line in validated[split].issue_lines():
                logger.warning("%s", line)
    if len(validated) == 2:
        check_same_categories(validated["train"], validated["val"])
    cfg = cfg.clone()
    cfg.defrost()
    for name, split, images in zip(USER_DATASETS, ("train", "val"), (train_images, val_images), strict=True):
        if split in validated:
            register_validated(name, validated[split], images, _cleaned_json(cfg, name))
        setattr(cfg.DATASETS, "TRAIN" if split == "train" else "TEST", (name,) if split in validated else ())
    if "val" not in validated:
        logger.warning("No --val-json given: the model will not be evaluated.")
    train = validated["train"].dataset["annotations"] if "train" in validated else ()
    if any(isinstance(annotation.get("segmentation"), dict) for annotation in train):
        cfg.INPUT.MASK_FORMAT = "bitmask"  # accepts polygons too; Detectron2's default does not accept RLE
    if cfg.MODEL.KEYPOINT_ON:
        _set_keypoints(cfg, next(iter(validated.values())))
    classes = next(iter(validated.values())).class_names
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)
    logger.info("%d classes: %s", len(classes), ", ".join(classes))
    cfg.freeze()
    return cfg


def _set_keypoints(cfg: CfgNode, validated: ValidatedCoco) -> None:
    count = len(validated.keypoint_names)
    if not count:
        raise DatasetError(
            f"{validated.json_file} has no keypoints: MODEL.KEYPOINT_ON=True expects 'keypoints', a list of names, in "
            "its categories."
        )
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = count
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    if cfg.DATASETS.TEST and len(sigmas or range(17)) != count:  # pycocotools has those of COCO's 17 keypoints
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS={list(sigmas)} is invalid: expected {count} numbers, one for each keypoint of "
            f"{validated.json_file}."
        )


def register_user_data_again(cfg: CfgNode, train_images: str | None, val_images: str | None) -> None:
    """Register the files written by :func:`register_user_data` in another process."""
    for name, images in zip(USER_DATASETS, (train_images, val_images), strict=True):
        if name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) and name not in DatasetCatalog.list():
            register_cleaned(name, images, _cleaned_json(cfg, name))


def user_data_files(cfg: CfgNode) -> list[Path]:
    """Return the files that :func:`register_user_data` writes for this config."""
    return [_cleaned_json(cfg, name) for name in USER_DATASETS if name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]


def _cleaned_json(cfg: CfgNode, name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "data" / f"{name}.json"
