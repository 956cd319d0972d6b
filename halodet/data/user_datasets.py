"""Find, or make, the datasets a config names before anything long starts."""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path

from halodet.data import ValidatedCoco, check_same_categories, register_checked, validate_coco
from halodet.data.build import wrap_dataset_errors
from halodet.errors import ConfigError

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

logger = logging.getLogger(__name__)

USER_DATASETS = ("user_train", "user_val")


def prepare_datasets(cfg: CfgNode, *, train: bool = True) -> None:
    """Check that every dataset of the config is there; draw halodet's own where it is not yet.

    Args:
        cfg: the run's config.
        train: also check DATASETS.TRAIN, which an evaluation does not need.

    Raises:
        ConfigError: a dataset has an unknown name, or its files are missing: where they were looked for and what to do.
        halodet.data.DatasetError: one to evaluate on cannot be read, which Detectron2 would find out at the first evaluation.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError(
            "DATASETS.TRAIN is empty: name a dataset to train on, or give --train-json and --train-images"
        )
    if not train and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name a dataset to evaluate on, or give --val-json and --val-images")
    for name in dict.fromkeys((*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST)):
        if name not in DatasetCatalog.list():
            if name in USER_DATASETS:
                raise ConfigError(
                    f"dataset {name} is your own data of an earlier run: give its --{name.removeprefix('user_')}-json again"
                )
            near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            raise ConfigError(
                f"there is no dataset {name!r}" + (f": the nearest are {', '.join(near)}" if near else "")
            )
        if name.startswith("halodet_shapes_"):
            try:
                DatasetCatalog.get(name)
            except (ValueError, OSError) as error:  # its folder cannot be written, or holds something else
                raise ConfigError(str(error)) from error
            continue
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type", "coco") != "coco" or "json_file" not in metadata.as_dict():
            raise ConfigError(
                f"dataset {name} is not one of COCO instances, which is what halodet's training tool evaluates"
            )
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path is not None and not os.path.exists(path):
                raise ConfigError(
                    f"dataset {name} was looked for at {os.path.abspath(path)}, which does not exist: put COCO there, "
                    "or set DETECTRON2_DATASETS to the folder that holds coco/ (see datasets/README.md)"
                )
        if name in cfg.DATASETS.TEST and name not in USER_DATASETS:
            with wrap_dataset_errors(name):
                DatasetCatalog.get(name)


def register_user_data(
    cfg: CfgNode, train_json: str | None, train_images: str | None, val_json: str | None, val_images: str | None
) -> CfgNode:
    """Check a user's COCO json files, register what is usable of them, and fit the config to them.

    The files stay as they are: what is usable is written to OUTPUT_DIR/data. Each fault found is logged in one line.

    Args:
        cfg: the run's config.
        train_json: COCO json to train on; not needed for an evaluation.
        train_images: folder its file names are relative to.
        val_json: COCO json to evaluate on.
        val_images: folder its file names are relative to.

    Returns:
        The config with DATASETS and the number of classes set.

    Raises:
        ConfigError: a json without its images, or without any.
        halodet.data.DatasetError: a json that cannot be used.
    """
    checked: dict[str, ValidatedCoco] = {}
    for split, json_file, images in (("train", train_json, train_images), ("val", val_json, val_images)):
        if bool(json_file) != bool(images):
            raise ConfigError(f"--{split}-json and --{split}-images belong together: only one of them is given")
        if json_file:
            checked[split] = validate_coco(
                json_file, images, need_masks=cfg.MODEL.MASK_ON, require_annotations=split == "train"
            )
            for line in checked[split].fault_lines():
                logger.warning(line)
    if len(checked) == 2:
        check_same_categories(checked["train"], checked["val"])
    cfg = cfg.clone()
    cfg.defrost()
    for name, split, images in zip(USER_DATASETS, ("train", "val"), (train_images, val_images), strict=True):
        if split in checked:
            register_checked(name, checked[split], images, _cleaned_json(cfg, name))
        setattr(cfg.DATASETS, "TRAIN" if split == "train" else "TEST", (name,) if split in checked else ())
    if "val" not in checked:
        logger.warning("No --val-json was given: nothing is evaluated.")
    if "train" in checked and any(
        isinstance(a.get("segmentation"), dict) for a in checked["train"].dataset["annotations"]
    ):
        cfg.INPUT.MASK_FORMAT = "bitmask"  # which takes polygons as well; Detectron2's default takes no RLE
    classes = next(iter(checked.values())).class_names
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(classes)
    logger.info(f"{len(classes)} classes: {', '.join(classes)}")
    cfg.freeze()
    return cfg


def register_user_data_again(cfg: CfgNode, train_images: str | None, val_images: str | None) -> None:
    """In a process that another one started: register what :func:`register_user_data` wrote there."""
    for name, images in zip(USER_DATASETS, (train_images, val_images), strict=True):
        if name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) and name not in DatasetCatalog.list():
            register_coco_instances(name, {}, str(_cleaned_json(cfg, name)), images)


def user_data_files(cfg: CfgNode) -> list[Path]:
    """What :func:`register_user_data` has written for this run."""
    return [_cleaned_json(cfg, name) for name in USER_DATASETS if name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]


def _cleaned_json(cfg: CfgNode, name: str) -> Path:
    return Path(cfg.OUTPUT_DIR) / "data" / f"{name}.json"
