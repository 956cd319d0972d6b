"""Random json files with faults: nothing is lost without a line, and the scores are pycocotools' own."""

import copy
import json
import re

from halodet.data import register_validated, validate_coco
from halodet.evaluation.coco import RobustCOCOEvaluator

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from helpers import noise
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAME = "test_random_json"
WIDTH, HEIGHT = 90, 70


def make_annotation(rng, number, image_id):
    w, h = rng.integers(8, 30, 2).tolist()
    x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
    polygon = [x, y, x + w, y, x + w, y + h, x + w / 2, y + h, x, y + h]
    mask = mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))
    rle = {"size": [HEIGHT, WIDTH], "counts": mask["counts"].decode()}
    return {
        "id": number, "image_id": image_id, "category_id": int(rng.choice([3, 5, 9])), "bbox": [x, y, w, h],
        "segmentation": [polygon] if rng.random() < 0.5 else rle, "area": float(mask_util.area(mask)),
        "iscrowd": int(rng.random() < 0.1),
    }  # fmt: skip


FAULTS = {
    "no box": lambda a: a.update(bbox=None),
    "box outside": lambda a: a.update(bbox=[500, 500, 10, 10]),
    "box beside": lambda a: a.update(bbox=[a["bbox"][0], a["bbox"][1], WIDTH * 4, HEIGHT * 4]),
    "corners": lambda a: a.update(bbox=[*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]),
    "area 0": lambda a: a.update(area=0),
    "no area": lambda a: a.pop("area"),
    "no mask": lambda a: a.update(segmentation=[]),
    "bad mask": lambda a: a.update(segmentation=[[1, 2, 3]]),
    "no iscrowd": lambda a: a.pop("iscrowd"),
    "unknown class": lambda a: a.update(category_id=4),
    "text id": lambda a: a.update(id=str(a["id"])),
    "uuid": lambda a: a.update(id=f"a-{a['id']}"),
    "text box": lambda a: a.update(bbox=[str(value) for value in a["bbox"]]),
    "text flag": lambda a: a.update(iscrowd=str(a["iscrowd"])),
    "flat mask": lambda a: isinstance(a["segmentation"], list) and a.update(segmentation=a["segmentation"][0]),
    "points": lambda a: (
        isinstance(a["segmentation"], list)
        and a.update(segmentation=[np.reshape(a["segmentation"][0], (-1, 2)).tolist()])
    ),
    "list of RLE": lambda a: isinstance(a["segmentation"], dict) and a.update(segmentation=[a["segmentation"]]),
}


def text_ids(data):
    for kind, key in (("images", "image_id"), ("categories", "category_id")):
        for entry in data[kind]:
            entry["id"] = f"{kind} {entry['id']}"
        for annotation in data["annotations"]:
            annotation[key] = f"{kind} {annotation[key]}"


def float_ids(data):
    for kind, key in (("images", "image_id"), ("categories", "category_id")):
        for entry in [*data[kind], *data["annotations"]]:
            name = key if key in entry else "id"
            entry[name] = float(entry[name])


def no_sizes(data):
    for image in data["images"][2:]:  # the file of the second one may be missing
        image.update(width=None, height=0)


FORMS = (text_ids, float_ids, no_sizes, lambda data: data.update(categories=2 * data["categories"]))


def make_json(rng, folder):
    """Write images and return a json of them, some with a fault."""
    data = {"images": [], "annotations": [], "categories": [{"id": k, "name": f"class {k}"} for k in (9, 3, 5)]}
    for image_id in range(1, 6):
        name = f"{image_id}.png"
        Image.fromarray(noise(HEIGHT, WIDTH)).save(folder / name)
        data["images"].append({"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for _ in range(rng.integers(0, 6)):
            data["annotations"].append(make_annotation(rng, len(data["annotations"]) + 1, image_id))
    for annotation in data["annotations"][1:]:
        if rng.random() < 0.3:
            FAULTS[rng.choice(list(FAULTS))](annotation)
    for annotation in list(data["annotations"]):
        if rng.random() < 0.1:
            data["annotations"].append({**copy.deepcopy(annotation), "id": 1000 + len(data["annotations"])})
    fault = rng.random()
    if fault < 0.2:
        (folder / "2.png").unlink()
    elif fault < 0.4:
        Image.fromarray(noise(HEIGHT, WIDTH + 1)).save(folder / "2.png")
    if rng.random() < 0.5:
        FORMS[rng.integers(len(FORMS))](data)
    return data


def evaluate(truth, detections, folder):
    """Metrics of halodet for COCO results that have ``bbox``, ``segmentation`` and the model's class."""
    evaluator = RobustCOCOEvaluator(
        NAME, output_dir=str(folder), report_dir=str(folder), default_tasks=("bbox", "segm")
    )
    evaluator.reset()
    for image_id in truth.imgs:
        found = [detection for detection in detections if detection["image_id"] == image_id]
        boxes = torch.tensor([d["bbox"] for d in found], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [torch.from_numpy(d["segmentation"]).bool() for d in found]
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(boxes)
        instances.pred_classes = torch.tensor([d["class"] for d in found], dtype=torch.int64)
        instances.scores = torch.tensor([d["score"] for d in found])
        instances.pred_masks = torch.stack(masks) if masks else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


def detect(rng, truth, perfect):
    """COCO results made from the ground truth: exact, or moved, lost and of another class."""
    classes = {category_id: index for index, category_id in enumerate(sorted(truth.cats))}
    found = []
    for annotation in truth.anns.values():
        if annotation["iscrowd"] or (not perfect and rng.random() < 0.3):
            continue
        x, y, w, h = annotation["bbox"]
        box = [x, y, x + w, y, x + w, y + h, x, y + h]
        mask = truth.annToMask({**annotation, "segmentation": annotation.get("segmentation", [box])})
        category_id = annotation["category_id"]
        if not perfect:
            x, y = x + float(rng.normal(0, 3)), y + float(rng.normal(0, 3))
            category_id = int(rng.choice(list(classes))) if rng.random() < 0.2 else category_id
        found.append({
            "image_id": annotation["image_id"], "category_id": category_id, "class": classes[category_id],
            "bbox": [x, y, w, h], "segmentation": mask, "score": round(float(rng.random()), 6),
        })  # fmt: skip
    return found


def explained(checked):
    """Number of annotations that the issues say are left out."""
    single = sum(issue.where.startswith("annotation ") and issue.action == "skipped" for issue in checked.issues)
    repeated = [issue.reason for issue in checked.issues if "repeat an earlier annotation" in issue.reason]
    return single + sum(int(re.match(r"\d+", reason)[0]) for reason in repeated)


def check(seed, folder):
    """Check one random json; returns whether all scores were perfect."""
    rng = np.random.default_rng(seed)
    data = make_json(rng, folder)
    file = folder / "data.json"
    file.write_text(json.dumps(data))
    checked = validate_coco(file, folder, evaluation=True)
    assert len(checked.dataset["annotations"]) == len(data["annotations"]) - explained(checked)
    assert len(checked.dataset["images"]) == 5
    register_validated(NAME, checked, folder / "clean.json")
    try:
        DatasetCatalog.get(NAME)
        truth = COCO(str(folder / "clean.json"))
        objects = [annotation for annotation in truth.anns.values() if not annotation["iscrowd"]]
        results = evaluate(truth, detect(rng, truth, perfect=True), folder)
        masks = any("segmentation" in annotation for annotation in objects)
        for task, expected in (("bbox", bool(objects)), ("segm", masks)):
            score = results[task]["AP"]
            assert score == pytest.approx(100) if expected else np.isnan(score), (seed, task)
        found = detect(rng, truth, perfect=False)
        if found:
            plain = [{key: value for key, value in d.items() if key != "segmentation"} for d in found]
            theirs = COCOeval(truth, truth.loadRes(plain), "bbox")
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
            expected = 100 * theirs.stats[0] if theirs.stats[0] >= 0 else float("nan")
            assert evaluate(truth, found, folder)["bbox"]["AP"] == pytest.approx(expected, abs=1e-3, nan_ok=True), seed
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_silently_and_scores_are_pycocotools_own(seed, tmp_path):
    check(seed, tmp_path)
