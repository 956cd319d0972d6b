"""Panoptic, semantic and keypoint annotations of the shapes agree with their instances, pixel by pixel."""

import json

from halodet.data import register_shape_layouts, write_layouts
from halodet.data.synthetic_shapes import NUM_IMAGES
from halodet.utils.shape_scenes import BACKGROUNDS, CLASSES

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

COUNT = 10  # with an empty image and a crowd


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_layouts(folder, "train", COUNT)
    return folder


def load(root, name):
    return json.loads((root / "annotations" / f"{name}.json").read_text())


def test_segments_are_the_instances_and_the_background(root):
    instances, panoptic = COCO(str(root / "annotations/train.json")), load(root, "panoptic_train")
    things = {c["id"] for c in panoptic["categories"] if c["isthing"]}
    assert len(panoptic["annotations"]) == COUNT and len(things) == len(CLASSES)
    crowds = 0
    for annotation in panoptic["annotations"]:
        rgb = cv2.imread(str(root / "panoptic_train" / annotation["file_name"]))[:, :, ::-1]
        ids = rgb.astype(int) @ (1, 256, 65536)
        labels = cv2.imread(str(root / "panoptic_stuff_train" / annotation["file_name"]), cv2.IMREAD_GRAYSCALE)
        *objects, background = annotation["segments_info"]
        true = instances.loadAnns(instances.getAnnIds(annotation["image_id"]))
        assert len(true) == len(objects) and set(np.unique(ids)) == {s["id"] for s in annotation["segments_info"]}
        for segment, instance in zip(objects, true, strict=True):
            mask = instances.annToMask(instance).astype(bool)
            assert np.array_equal(ids == segment["id"], mask)
            assert segment["category_id"] == instance["category_id"] in things
            assert segment["iscrowd"] == instance["iscrowd"] and segment["area"] == mask.sum() == instance["area"]
            crowds += segment["iscrowd"]
        outside = ids == background["id"]
        assert np.array_equal(labels == 0, ~outside) and background["area"] == outside.sum()
        stuff = background["category_id"] - len(CLASSES)
        assert np.unique(labels[outside]).tolist() == [stuff] and 1 <= stuff <= len(BACKGROUNDS)
        encoded = mask_util.encode(np.asfortranarray(outside, np.uint8))
        assert background["bbox"] == mask_util.toBbox(encoded).tolist()
    assert crowds == 1


def test_keypoints_are_outermost_pixels(root):
    keypoints = COCO(str(root / "annotations/keypoints_train.json"))
    assert keypoints.cats[1]["keypoints"] == ["top", "right", "bottom", "left"]
    for annotation in keypoints.anns.values():
        mask = keypoints.annToMask(annotation).astype(bool)
        (tx, ty, _), (rx, ry, _), (bx, by, _), (lx, ly, visible) = np.reshape(annotation["keypoints"], (4, 3)).tolist()
        rows, columns = np.nonzero(mask)
        assert (ty, by, lx, rx) == (rows.min(), rows.max(), columns.min(), columns.max())
        assert columns[rows == ty].min() <= tx <= columns[rows == ty].max() and visible == 2
        assert rows[columns == rx].min() <= ry <= rows[columns == rx].max()
    assert len(keypoints.anns) > 20


def test_existing_files_are_kept_and_those_of_other_arguments_replaced(tmp_path):
    write_layouts(tmp_path, "val", 2)
    json_file = tmp_path / "annotations/panoptic_val.json"
    before = json_file.stat().st_mtime_ns
    write_layouts(tmp_path, "val", 2)
    assert json_file.stat().st_mtime_ns == before
    write_layouts(tmp_path, "val", 3)
    assert len(load(tmp_path, "panoptic_val")["images"]) == 3


def test_datasets_are_written_when_they_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(NUM_IMAGES, "val", 3)
    usual = MetadataCatalog.get("halodet_shapes_keypoints_val").image_root.removesuffix("/val")
    register_shape_layouts(tmp_path)
    try:
        records = DatasetCatalog.get("halodet_shapes_panoptic_val_separated")
        assert len(records) == 3 and {"sem_seg_file_name", "annotations"} <= records[0].keys()
        assert len(DatasetCatalog.get("halodet_shapes_panoptic_val_stuffonly")) == 3
        points = [a for r in DatasetCatalog.get("halodet_shapes_keypoints_val") for a in r["annotations"]]
        assert points and all(len(a["keypoints"]) == 12 for a in points)
    finally:
        register_shape_layouts(usual)
    assert MetadataCatalog.get("halodet_shapes_keypoints_val").image_root.removesuffix("/val") == usual
