"""Panoptic, semantic and keypoint annotations of the synthetic shapes, in the layouts of COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halodet.data.synthetic_shapes import NUM_IMAGES, VERSION, shape_scene, write_shapes
from halodet.utils.io import write_json
from halodet.utils.shape_scenes import BACKGROUNDS, CLASSES, Scene

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.data.datasets.coco_panoptic import merge_to_panoptic
from iopath.common.file_io import file_lock
from tqdm import tqdm

KEYPOINTS = ("top", "right", "bottom", "left")
_CATEGORIES = [
    *({"id": number, "name": name, "isthing": 1} for number, name in enumerate(CLASSES, 1)),
    *({"id": number, "name": name, "isthing": 0} for number, name in enumerate(BACKGROUNDS, len(CLASSES) + 1)),
]


def write_layouts(root: str | Path, split: str, num_images: int, seed: int = 0) -> None:
    """Write the further annotations of the dataset that :func:`write_shapes` writes, unless they exist.

    ``annotations/panoptic_<split>.json`` with ``panoptic_<split>/*.png`` are in the panoptic format of COCO; things are
    the shapes, stuff is the texture of the background. ``panoptic_stuff_<split>/*.png`` has the labels of a semantic
    segmentation as Detectron2's prepare_panoptic_fpn.py makes them: 0 for things, 1 to 4 for stuff.
    ``annotations/keypoints_<split>.json`` has the outermost pixels of each object at the top, right, bottom and left.

    Args:
        root: folder of the dataset.
        split: "train" or "val".
        num_images: number of images.
        seed: seed, 0 or more.

    Raises:
        ValueError: see :func:`write_shapes`.
        OSError: the folder cannot be written.
    """
    root = Path(root)
    instances = write_shapes(root, split, num_images, seed)
    info = {"description": "halodet shapes", "version": VERSION, "split": split, "num_images": num_images, "seed": seed}
    last = root / "annotations" / f"panoptic_{split}.json"
    if _info(last) == info:
        return
    with file_lock(str(last)):  # all ranks of a run get here at once
        if _info(last) != info:
            _write(root, split, info, json.loads(instances.read_bytes()), last)


def _info(path: Path) -> Any:
    return json.loads(path.read_bytes())["info"] if path.is_file() else None


def _write(root: Path, split: str, info: dict[str, Any], dataset: dict[str, Any], last: Path) -> None:
    panoptic, semantic = root / f"panoptic_{split}", root / f"panoptic_stuff_{split}"
    panoptic.mkdir(exist_ok=True)
    semantic.mkdir(exist_ok=True)
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    segments = []
    for image in tqdm(dataset["images"], desc=f"annotating shapes, {split}", unit="image"):
        scene = shape_scene(split, image["id"], info["seed"])
        stuff = len(CLASSES) + 1 + BACKGROUNDS.index(scene.background)
        ids = np.where(scene.owner > 0, scene.owner, len(scene.classes) + 1)  # from 1, as 0 is void
        rgb = np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=-1).astype(np.uint8)  # id = R + 256 G + ...
        cv2.imwrite(str(panoptic / image["file_name"]), rgb[:, :, ::-1])
        labels = np.where(scene.owner > 0, 0, stuff - len(CLASSES)).astype(np.uint8)
        cv2.imwrite(str(semantic / image["file_name"]), labels)
        annotations = by_image[image["id"]]
        infos = [
            {"id": number, **{key: annotation[key] for key in ("category_id", "iscrowd", "area", "bbox")}}
            for number, annotation in enumerate(annotations, 1)
        ]
        x, y, width, height = cv2.boundingRect((scene.owner == 0).astype(np.uint8))
        area = int((scene.owner == 0).sum())
        infos.append(
            {"id": len(infos) + 1, "category_id": stuff, "iscrowd": 0, "area": area, "bbox": [x, y, width, height]}
        )
        segments.append({"image_id": image["id"], "file_name": image["file_name"], "segments_info": infos})
        for number, annotation in enumerate(annotations, 1):
            annotation |= _keypoints(scene, number)
    keypoints = [{**c, "keypoints": list(KEYPOINTS), "skeleton": [[1, 3], [2, 4]]} for c in dataset["categories"]]
    write_json(root / "annotations" / f"keypoints_{split}.json", {**dataset, "categories": keypoints})
    panoptic_dataset = {"info": info, "images": dataset["images"], "annotations": segments, "categories": _CATEGORIES}
    write_json(last, panoptic_dataset)  # marks the layouts as complete


def _keypoints(scene: Scene, number: int) -> dict[str, Any]:
    rows, columns = np.nonzero(scene.owner == number)
    # the middle of the outermost row or column of pixels
    top, bottom = (round(float(np.median(columns[rows == edge]))) for edge in (rows.min(), rows.max()))
    left, right = (round(float(np.median(rows[columns == edge]))) for edge in (columns.min(), columns.max()))
    points = [(top, rows.min()), (columns.max(), right), (bottom, rows.max()), (columns.min(), left)]
    flat = [value for x, y in points for value in (int(x), int(y), 2)]
    return {"keypoints": flat, "num_keypoints": len(points)}


def register_shape_layouts(root: str | Path = "datasets/shapes") -> None:
    """Register the layouts under names such as those of COCO; they are written when a split is first loaded.

    ``halodet_shapes_panoptic_<split>_separated`` is for PanopticFPN, ``halodet_shapes_panoptic_<split>_stuffonly`` for
    SemanticSegmentor and ``halodet_shapes_keypoints_<split>`` for keypoint R-CNN.

    Args:
        root: folder of the dataset; another one replaces that of an earlier call.
    """
    root = Path(root)
    stuff = {0: 0, **{len(CLASSES) + number: number for number in range(1, len(BACKGROUNDS) + 1)}}
    metadata = {
        "thing_classes": list(CLASSES),
        "thing_dataset_id_to_contiguous_id": {number: number - 1 for number in range(1, len(CLASSES) + 1)},
        "stuff_classes": ["things", *BACKGROUNDS],
        "stuff_dataset_id_to_contiguous_id": stuff,
        "ignore_label": 255,
    }
    keypoints = {"keypoint_names": list(KEYPOINTS), "keypoint_flip_map": [("left", "right")]}
    for split in NUM_IMAGES:
        annotations = root / "annotations"
        panoptic = {
            "sem_seg_root": str(root / f"panoptic_stuff_{split}"),
            "panoptic_root": str(root / f"panoptic_{split}"),
            "panoptic_json": str(annotations / f"panoptic_{split}.json"),
            **metadata,
        }
        _register(
            f"halodet_shapes_panoptic_{split}_separated",
            root,
            split,
            evaluator_type="coco_panoptic_seg",
            json_file=str(annotations / f"{split}.json"),
            **panoptic,
        )
        _register(f"halodet_shapes_panoptic_{split}_stuffonly", root, split, evaluator_type="sem_seg", **panoptic)
        _register(
            f"halodet_shapes_keypoints_{split}",
            root,
            split,
            evaluator_type="coco",
            json_file=str(annotations / f"keypoints_{split}.json"),
            thing_classes=list(CLASSES),
            **keypoints,
        )


def _register(name: str, root: Path, split: str, **metadata: Any) -> None:
    images = str(root / split)
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).image_root == images:
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

    def load() -> list[dict[str, Any]]:
        write_layouts(root, split, NUM_IMAGES[split])
        instances = load_coco_json(metadata["json_file"], images, name) if "json_file" in metadata else []
        if "sem_seg_root" not in metadata:
            return instances
        labels = load_sem_seg(metadata["sem_seg_root"], images, image_ext="png")
        return merge_to_panoptic(instances, labels) if instances else labels

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(image_root=images, **metadata)
