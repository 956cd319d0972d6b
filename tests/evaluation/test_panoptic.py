"""Panoptic quality against sets of pixels, and against panopticapi where it is installed."""

import json
from itertools import product

from halodet.evaluation.panoptic import PanopticEvaluator, panoptic_counts

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator
from PIL import Image

SIZE = (23, 31)


def random_segments(rng, count):
    """A map of blobs with ids 0 (void) to ``count``."""
    centers = rng.uniform(0, 1, (count + 1, 2)) * SIZE
    pixels = np.stack(np.mgrid[0 : SIZE[0], 0 : SIZE[1]], axis=-1)
    distance = np.linalg.norm(pixels[:, :, None] - centers, axis=-1) * rng.uniform(0.6, 1.4, count + 1)
    return distance.argmin(-1)


def disturbed(rng, ids):
    """A prediction: most pixels of ``ids``, some of others, with ids renamed."""
    moved = np.where(rng.uniform(size=SIZE) < 0.2, np.roll(ids, 3, axis=1), ids)
    return moved


def counted_by_sets(target, segments, predicted, categories):
    """(IoU sum, TP, FP, FN) per category from sets of pixels, each pair of segments compared."""

    def pixels(ids, number):
        return set(zip(*map(list, np.nonzero(ids == number)), strict=True))

    void = pixels(target, 0)
    result = {c: [0.0, 0, 0, 0] for c in [*categories.values(), *(s["category_id"] for s in segments)]}
    found = {p: pixels(predicted, p) for p in categories if (predicted == p).any()}
    used_true, used_predicted = set(), set()
    for segment, p in product(segments, found):
        if segment["iscrowd"] or segment["category_id"] != categories[p]:
            continue
        true = pixels(target, segment["id"])
        both, either = true & found[p], (true | found[p]) - (void & found[p])
        if len(both) * 2 > len(either):
            result[categories[p]][0] += len(both) / len(either)
            result[categories[p]][1] += 1
            used_true.add(segment["id"])
            used_predicted.add(p)
    for segment in segments:
        if not segment["iscrowd"] and segment["id"] not in used_true:
            result[segment["category_id"]][3] += 1
    for p, area in found.items():
        crowd = set()
        for segment in segments:
            if segment["iscrowd"] and segment["category_id"] == categories[p]:
                crowd |= pixels(target, segment["id"])
        if p not in used_predicted and len(area & (void | crowd)) * 2 <= len(area):
            result[categories[p]][2] += 1
    return result


def case(seed):
    rng = np.random.default_rng(seed)
    target = random_segments(rng, 6)
    segments = [
        {"id": i, "category_id": int(rng.integers(1, 4)), "iscrowd": 0} for i in range(1, 7) if (target == i).any()
    ]
    segments[0]["iscrowd"] = 1
    if seed % 2:  # a thing that is all crowd or void
        segments[0]["category_id"] = 9
    predicted = disturbed(rng, target)
    predicted[:3] = 7
    categories = {s["id"]: s["category_id"] if rng.uniform() < 0.8 else 2 for s in segments} | {7: 3}
    predicted[~np.isin(predicted, list(categories))] = 0
    return target, segments, predicted, {p: c for p, c in categories.items() if (predicted == p).any()}


@pytest.mark.parametrize("seed", range(6))
def test_counts_equal_those_of_sets_of_pixels(seed):
    arguments = case(seed)
    expected = counted_by_sets(*arguments)
    found = panoptic_counts(*arguments)
    assert sum(values[1] for values in expected.values()) >= 1, "nothing matches"
    for category, values in expected.items():
        assert found[category].tolist() == pytest.approx(values), category


@pytest.fixture
def dataset(tmp_path):
    """A registered panoptic dataset of random maps, with the model's outputs: name, inputs, outputs."""
    name = "panoptic_quality_test"
    categories = [{"id": c, "name": str(c), "isthing": int(c < 3)} for c in (1, 2, 3, 9)]
    images, annotations, inputs, outputs = [], [], [], []
    for seed in range(6):
        target, segments, predicted, found = case(seed)
        rgb = np.stack([target % 256, target // 256, target // 65536], -1).astype(np.uint8)
        Image.fromarray(rgb).save(tmp_path / f"{seed}.png")
        segments = [{**s, "area": int((target == s["id"]).sum())} for s in segments]
        images.append({"id": seed, "file_name": f"{seed}.jpg", "height": SIZE[0], "width": SIZE[1]})
        annotations.append({"image_id": seed, "file_name": f"{seed}.png", "segments_info": segments})
        inputs.append({"image_id": seed, "file_name": f"photos/{seed}.jpg"})
        infos = [
            {"id": p, "isthing": c < 3, "category_id": {1: 0, 2: 1, 3: 1, 9: 2}[c], "area": 1} for p, c in found.items()
        ]
        outputs.append({"panoptic_seg": (torch.as_tensor(predicted.astype("int32")), infos)})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    MetadataCatalog.get(name).set(
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        stuff_dataset_id_to_contiguous_id={0: 0, 3: 1, 9: 2},
        panoptic_root=str(tmp_path),
        panoptic_json=str(tmp_path / "panoptic.json"),
    )
    yield name, inputs, outputs
    MetadataCatalog.remove(name)


def evaluate(evaluator, inputs, outputs):
    evaluator.reset()
    for sample, output in zip(inputs, outputs, strict=True):
        evaluator.process([sample], [output])
    return evaluator.evaluate()["panoptic_seg"]


def test_results_are_means_over_the_categories_that_occur(dataset):
    name, inputs, outputs = dataset
    found = evaluate(PanopticEvaluator(name), inputs, outputs)
    totals = {}
    for seed in range(6):
        for category, values in counted_by_sets(*case(seed)).items():
            totals[category] = np.add(totals.get(category, 0), values)
    totals = {category: values for category, values in totals.items() if values.any()}
    pq = {category: iou / (tp + fp / 2 + fn / 2) for category, (iou, tp, fp, fn) in totals.items()}
    assert 5 < found["PQ"] < 95
    assert found["PQ"] == pytest.approx(100 * np.mean(list(pq.values())))
    assert found["PQ_th"] == pytest.approx(100 * np.mean([value for category, value in pq.items() if category < 3]))
    assert set(found) == {f"{kind}{group}" for kind in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st")}


def test_results_equal_panopticapis(dataset, tmp_path):
    pytest.importorskip("panopticapi", reason="panopticapi is not on the package index")
    name, inputs, outputs = dataset
    found = evaluate(PanopticEvaluator(name), inputs, outputs)
    assert found == pytest.approx(evaluate(COCOPanopticEvaluator(name, str(tmp_path)), inputs, outputs))


def test_a_perfect_prediction(dataset):
    name, inputs, _ = dataset
    outputs = []
    for sample in inputs:
        target, segments, _, _ = case(sample["image_id"])
        infos = [{"id": s["id"], "category_id": s["category_id"]} for s in segments]  # dataset's ids, as some models
        outputs.append({"panoptic_seg": (torch.as_tensor(target), infos)})
    assert evaluate(PanopticEvaluator(name), inputs, outputs) == pytest.approx(
        {f"{kind}{group}": 100.0 for kind in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st")}
    )
