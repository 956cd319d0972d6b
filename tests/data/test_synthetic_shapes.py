"""Tests of the synthetic shapes dataset."""

import json

from halodet.data import register_shapes, validate_coco, write_shapes
from halodet.data import synthetic_shapes as shapes
from halodet.utils import shape_scenes

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NUM_IMAGES = 100


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, "train", NUM_IMAGES)
    return root


@pytest.fixture(scope="module")
def dataset(root):
    return json.loads((root / "annotations" / "train.json").read_bytes())


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def decode(annotation, image):
    segmentation, size = annotation["segmentation"], (image["height"], image["width"])
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *size)
    return mask_util.decode(segmentation)


def test_boxes_areas_and_masks_agree_and_visible_masks_do_not_overlap(dataset):
    for image in dataset["images"]:
        seen = np.zeros((image["height"], image["width"]), int)
        for annotation in (a for a in dataset["annotations"] if a["image_id"] == image["id"]):
            mask = decode(annotation, image)
            assert annotation["area"] == mask.sum() > 0
            assert annotation["bbox"] == list(cv2.boundingRect(mask))
            seen += mask
        assert seen.max() <= 1


def test_masks_lie_where_the_objects_are_painted(root, monkeypatch):
    # Painted in white on black, the picture itself must show every mask.
    monkeypatch.setattr(
        shape_scenes, "_background", lambda rng, height, width: (np.zeros((height, width, 3), np.float32), "black")
    )
    monkeypatch.setattr(shape_scenes, "_color", lambda *_: np.full(3, 255, np.float32))
    for index in range(8):
        scene = shapes.draw_scene(np.random.default_rng((0, 0, index)), index)
        painted, mask = scene.image.max(axis=2) > 0, (scene.owner > 0).astype(np.uint8)
        beside = np.ones((3, 3), np.uint8)  # a pixel on an edge may be painted and yet be less than half covered
        assert painted[cv2.erode(mask, beside) > 0].all() and not painted[cv2.dilate(mask, beside) == 0].any()
        assert painted.any() or index == 3


def test_scenes_have_what_the_readme_promises(dataset):
    annotations = dataset["annotations"]
    polygons = sum(isinstance(a["segmentation"], list) for a in annotations)
    assert len(annotations) / 2 < polygons < len(annotations)
    assert {a["category_id"] for a in annotations} == set(range(1, len(shapes.CLASSES) + 1))
    crowds = [a for a in annotations if a["iscrowd"]]
    assert crowds and all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    assert {image["id"] for image in dataset["images"]} - {
        a["image_id"] for a in annotations
    }  # an image with no objects
    areas = [a["area"] for a in annotations]
    assert min(areas) < 32**2 and max(areas) > 96**2
    assert {image["width"] > image["height"] for image in dataset["images"]} == {True, False}


def test_a_whole_ring_has_a_hole_and_so_is_rle(dataset):
    rings = [a for a in dataset["annotations"] if shapes.CLASSES[a["category_id"] - 1] == "ring" and not a["iscrowd"]]
    assert sum(isinstance(a["segmentation"], dict) for a in rings) > len(rings) / 2


def test_same_seed_same_bytes_and_other_seed_or_split_other_bytes(tmp_path):
    pictures = set()
    for name, split, seed in (("a", "train", 0), ("b", "train", 0), ("c", "train", 1), ("d", "val", 0)):
        write_shapes(tmp_path / name, split, 3, seed)
        pictures.add((tmp_path / name / split / "000000.png").read_bytes())
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(pictures) == 3


def test_an_image_does_not_depend_on_the_count(root, dataset, tmp_path):
    few = json.loads(write_shapes(tmp_path, "train", 3).read_bytes())
    for path in sorted((tmp_path / "train").iterdir()):
        assert path.read_bytes() == (root / "train" / path.name).read_bytes()
    assert few["annotations"] == dataset["annotations"][: len(few["annotations"])]


def test_complete_dataset_is_kept_and_a_changed_one_is_drawn_anew(tmp_path, monkeypatch):
    write_shapes(tmp_path, "val", 2)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_scene", lambda *_: pytest.fail("drawn again"))
        write_shapes(tmp_path, "val", 2)
    (tmp_path / "val" / "000001.png").unlink()
    write_shapes(tmp_path, "val", 2)
    assert files(tmp_path) == before
    write_shapes(tmp_path, "val", 1)
    assert [path.name for path in (tmp_path / "val").iterdir()] == ["000000.png"]


def test_interrupted_drawing_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    draw = shapes.draw_scene

    def interrupt(rng, index):
        if index == 2:
            raise KeyboardInterrupt
        return draw(rng, index)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path, "val", 3)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.json"))
    assert len(json.loads(write_shapes(tmp_path, "val", 3).read_bytes())["images"]) == 3


@pytest.mark.parametrize("place", ["annotations/val.json", "val/photo.jpg"])
def test_files_of_others_are_left_alone(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir()
    path.write_text('{"info": {"description": "mine"}}')
    with pytest.raises(ValueError, match="not replaced"):
        write_shapes(tmp_path, "val", 1)
    assert path.read_text() == '{"info": {"description": "mine"}}'


def test_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_shapes(tmp_path / "file" / "shapes", "val", 1)


@pytest.mark.parametrize(("split", "count", "seed"), [("test", 1, 0), ("val", 0, 0), ("val", 1, -1)])
def test_wrong_arguments(tmp_path, split, count, seed):
    with pytest.raises(ValueError, match="is invalid"):
        write_shapes(tmp_path, split, count, seed)


def test_registered_names_draw_on_first_use(tmp_path, monkeypatch):
    assert {"halodet_shapes_train", "halodet_shapes_val"} <= set(DatasetCatalog.list())
    usual = MetadataCatalog.get("halodet_shapes_val").image_root.removesuffix("val")
    monkeypatch.setitem(shapes.NUM_IMAGES, "val", 4)
    try:
        register_shapes(tmp_path)
        register_shapes(tmp_path)
        assert not list(tmp_path.iterdir())
        records = DatasetCatalog.get("halodet_shapes_val")
        metadata = MetadataCatalog.get("halodet_shapes_val")
        assert len(records) == 4 and all(
            cv2.imread(r["file_name"]).shape[:2] == (r["height"], r["width"]) for r in records
        )
        assert metadata.thing_classes == list(shapes.CLASSES) and metadata.evaluator_type == "coco"
        assert metadata.json_file == str(tmp_path / "annotations" / "val.json")
    finally:
        register_shapes(usual.rstrip("/"))
    assert MetadataCatalog.get("halodet_shapes_val").image_root.removesuffix("val") == usual


def test_the_truth_scores_a_full_ap_and_passes_the_check(root, dataset):
    json_file = root / "annotations" / "train.json"
    assert validate_coco(json_file, root / "train").issues == []
    assert len(load_coco_json(str(json_file), str(root / "train"))) == NUM_IMAGES
    truth = COCO(str(json_file))
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "segmentation": truth.annToRLE(a), "score": 1.0}
        for a in dataset["annotations"]
        if not a["iscrowd"]
    ]
    evaluation = COCOeval(truth, truth.loadRes(perfect), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
