"""Detectron2's dataset dicts of a COCO dataset that is in memory, and its registration."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from halodet.utils.gc_pause import paused_gc
from halodet.utils.io import write_json

import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

_KEYS = ("iscrowd", "bbox", "keypoints")


@paused_gc()
def to_records(dataset: dict[str, Any], image_root: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return what Detectron2's ``load_coco_json`` returns for the file of a valid dataset, without reading it again.

    Args:
        dataset: COCO dict of ``images``, ``annotations`` and ``categories``.
        image_root: folder that file names are relative to.
    """
    index = {number: i for i, number in enumerate(sorted(entry["id"] for entry in dataset["categories"]))}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in dataset["annotations"]:
        record = {key: annotation[key] for key in _KEYS if key in annotation}
        mask = annotation.get("segmentation")
        if isinstance(mask, dict) and isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *mask["size"])
        if mask:
            record["segmentation"] = mask
        if "keypoints" in record:  # COCO's are indices of pixels, Detectron2's are coordinates
            points = record["keypoints"]
            record["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
        record["bbox_mode"] = BoxMode.XYWH_ABS
        record["category_id"] = index[annotation["category_id"]]
        by_image[annotation["image_id"]].append(record)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image.get(image["id"], []),
        }
        for image in sorted(dataset["images"], key=lambda image: image["id"])
    ]


def register_cleaned(
    name: str,
    json_file: str | Path,
    dataset: dict[str, Any] | None = None,
    image_dir: str | Path | None = None,
) -> None:
    """Register a validated json; its annotations are not validated again.

    Args:
        name: name for ``cfg.DATASETS``.
        json_file: the json.
        dataset: what the json contains; the first load takes it from here, later ones and other processes from the
            file.
        image_dir: folder that file names are relative to; given by the process that has written the json, from which
            the others read it.
    """
    sidecar = Path(json_file).with_suffix(".info.json")  # what other processes need before they read the annotations
    if dataset:
        write_json(sidecar, {"image_dir": os.path.abspath(image_dir), "categories": dataset["categories"]})
    info = json.loads(sidecar.read_text(encoding="utf-8"))
    image_root, categories = info["image_dir"] if image_dir is None else str(image_dir), info["categories"]
    held = [dataset] if dataset else []

    def load() -> list[dict[str, Any]]:
        if held:
            return to_records(held.pop(), image_root)
        return load_coco_json(str(json_file), image_root, name)

    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(name)
    metadata.set(json_file=str(json_file), image_root=image_root, evaluator_type="coco", validated=True)
    metadata.set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={category["id"]: index for index, category in enumerate(categories)},
        **keypoint_metadata(categories),
    )


def keypoint_names(categories: list[dict[str, Any]]) -> list[str]:
    """Return the keypoint names of the first category that has them; empty if none has."""
    return next((category["keypoints"] for category in categories if "keypoints" in category), [])


def keypoint_metadata(categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Detectron2's metadata of the keypoints of the first category that has them.

    A horizontal flip exchanges the keypoints whose names differ in "left" and "right" only.
    """
    names = keypoint_names(categories)
    if not names:
        return {}
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    return {"keypoint_names": names, "keypoint_flip_map": [pair for pair in pairs if pair[1] in names]}
