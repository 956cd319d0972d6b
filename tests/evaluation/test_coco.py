"""COCO metrics in the cases that Detectron2's evaluator leaves out: no detection, and more than 100 per image."""

import json

from halodet.config import load_config
from halodet.evaluation.build import build_evaluator

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SIZE, NAME = 200, "test_coco_grid"


@pytest.fixture
def grid(tmp_path):
    """A registered dataset of one image with 150 objects of one class of four, and one without objects."""
    boxes = [[13.0 * (i % 15), 19.0 * (i // 15), 10.0, 12.0] for i in range(150)]
    annotations = [
        {
            "id": index + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 120.0, "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for index, box in enumerate(boxes)
        for x, y, w, h in [box]
    ]  # fmt: skip
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 5)],
    }
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(data))
    register_coco_instances(NAME, {}, str(file), str(tmp_path))
    DatasetCatalog.get(NAME)  # sets the metadata
    yield file
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def evaluate(folder, detections, *opts):
    """Metrics of (box, class, score) in image 1 and nothing in image 2."""
    cfg = load_config("mask_rcnn_halo_h0", ["OUTPUT_DIR", str(folder), "MODEL.ROI_HEADS.NUM_CLASSES", "4", *opts])
    evaluator = build_evaluator(cfg, NAME)
    evaluator.reset()
    for image_id, found in ((1, detections), (2, [])):
        boxes = torch.tensor([box for box, _, _ in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.zeros(len(found), SIZE, SIZE, dtype=torch.bool)
        for mask, box in zip(masks, boxes.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        classes, scores = (torch.tensor([entry[i] for entry in found]) for i in (1, 2))
        fields = {"pred_boxes": Boxes(boxes), "pred_classes": classes.long(), "scores": scores, "pred_masks": masks}
        evaluator.process([{"image_id": image_id}], [{"instances": Instances((SIZE, SIZE), **fields)}])
    return evaluator.evaluate()


def test_nothing_detected_is_an_ap_of_zero(grid, tmp_path):
    results = evaluate(tmp_path, [])
    assert set(results) == {"bbox", "segm"}
    for metrics in results.values():
        assert metrics["AP"] == metrics["AP50"] == metrics["APs"] == metrics["AP-class 1"] == 0
        assert np.isnan(metrics["APl"]) and np.isnan(metrics["AP-class 3"])  # no ground truth
    assert set(evaluate(tmp_path, [], "MODEL.MASK_ON", "False")) == {"bbox"}


@pytest.mark.parametrize(("limit", "expected"), [("100", 66.0), ("150", 100.0), ("-1", 100.0)])
def test_detections_per_image_above_100_reach_the_metric(grid, tmp_path, limit, expected):
    annotations = json.loads(grid.read_text())["annotations"]
    perfect = [(a["bbox"], a["category_id"] - 1, 1 - a["id"] / 1000) for a in annotations]
    results = evaluate(tmp_path, perfect, "TEST.DETECTIONS_PER_IMAGE", limit)
    assert results["bbox"]["AP"] == pytest.approx(expected, abs=1.0)
    assert results["segm"]["AP"] == pytest.approx(expected, abs=1.0)


def test_objects_without_a_mask_count_for_boxes_and_are_ignored_for_masks(grid, tmp_path):
    data = json.loads(grid.read_text())
    kept = data["annotations"][:80]
    for annotation in kept[::2]:
        del annotation["segmentation"]
    data["annotations"] = kept
    grid.write_text(json.dumps(data))
    perfect = [(a["bbox"], 0, 1 - a["id"] / 1000) for a in kept]
    results = evaluate(tmp_path, perfect)
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)
    with_masks = [detection for detection, a in zip(perfect, kept, strict=True) if "segmentation" in a]
    results = evaluate(tmp_path, with_masks[::2])
    assert results["bbox"]["AP"] == pytest.approx(25, abs=1) and results["segm"]["AP"] == pytest.approx(50, abs=1)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_pycocotools_own(grid, tmp_path, seed):
    rng = np.random.default_rng(seed)
    annotations = json.loads(grid.read_text())["annotations"]
    found = [
        ((np.array(a["bbox"]) + rng.normal(0, 1.5, 4)).round(2).tolist(), int(rng.integers(0, 4)) if rng.random() < 0.3
         else a["category_id"] - 1, float(rng.random()))
        for a in annotations if rng.random() < 0.6
    ]  # fmt: skip
    metrics = evaluate(tmp_path, found)["bbox"]
    truth = COCO(str(grid))
    results = [
        {"image_id": 1, "category_id": int(label) + 1, "bbox": box, "score": score} for box, label, score in found
    ]
    theirs = COCOeval(truth, truth.loadRes(results), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert 0 < theirs.stats[0] < 1
    for key, value in zip(("AP", "AP50", "AP75", "APs"), theirs.stats, strict=False):
        assert metrics[key] == pytest.approx(100 * value, abs=1e-3)
