"""Panoptic quality without panopticapi, which the package index does not have."""

from __future__ import annotations

import json
import os
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.panoptic_evaluation import _print_panoptic_results
from detectron2.utils import comm
from PIL import Image

VOID = 0  # id of unlabeled pixels
IOU, TP, FP, FN = range(4)


class PanopticEvaluator(DatasetEvaluator):
    """Panoptic quality (PQ), segmentation quality (SQ) and recognition quality (RQ) on a COCO panoptic dataset.

    The results have the names, and the numbers, of Detectron2's ``COCOPanopticEvaluator``.

    Args:
        dataset_name: name of a dataset with the metadata of Detectron2's panoptic datasets.

    Raises:
        AttributeError: the dataset has no such metadata.

    Source: Kirillov et al., Panoptic Segmentation, CVPR 2019 (arXiv 1801.00868).
    """

    def __init__(self, dataset_name: str) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._things = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
        self._stuff = {v: k for k, v in metadata.stuff_dataset_id_to_contiguous_id.items()}
        self._label_divisor = metadata.get("label_divisor", 0)
        self._root = metadata.panoptic_root
        with open(metadata.panoptic_json, encoding="utf-8") as file:
            content = json.load(file)
        self._categories = {category["id"]: bool(category["isthing"]) for category in content["categories"]}
        self._targets = {annotation["image_id"]: annotation for annotation in content["annotations"]}
        self.reset()

    def reset(self) -> None:
        self._counts: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Count the matches of a batch."""
        for sample, output in zip(inputs, outputs, strict=True):
            target = self._targets[sample["image_id"]]
            with Image.open(os.path.join(self._root, target["file_name"])) as image:
                rgb = np.array(image.convert("RGB"), dtype=np.int64)
            ids = rgb @ (1, 256, 256**2)
            predicted, categories = self._segments(*output["panoptic_seg"])
            counts = panoptic_counts(ids, target["segments_info"], predicted, categories)
            for category, values in counts.items():
                self._counts[category] += values

    def _segments(self, panoptic: Any, infos: list[dict[str, Any]] | None) -> tuple[np.ndarray, dict[int, int]]:
        """Return the predicted map of ids (0 is void), and the dataset's category of each id."""
        ids = panoptic.cpu().numpy().astype(np.int64)
        if infos is None:  # category * label_divisor + instance, -1 is void
            found = [int(label) for label in np.unique(ids) if label != -1]
            categories = {label + 1: self._category(label // self._label_divisor) for label in found}
            return ids + 1, categories
        return ids, {
            info["id"]: (self._things if info["isthing"] else self._stuff)[info["category_id"]]
            if info.get("isthing") is not None
            else info["category_id"]
            for info in infos
        }

    def _category(self, label: int) -> int:
        return self._things[label] if label in self._things else self._stuff[label]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return the results in percent, on the main process."""
        total: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
        for counts in comm.gather(dict(self._counts)):
            for category, values in counts.items():
                total[category] += values
        if not comm.is_main_process():
            return None
        groups = {"All": set(self._categories)}
        groups["Things"] = {category for category, is_thing in self._categories.items() if is_thing}
        groups["Stuff"] = groups["All"] - groups["Things"]
        quality = {name: _average([total[c] for c in group if total[c].any()]) for name, group in groups.items()}
        _print_panoptic_results(quality)
        suffixes = {"All": "", "Things": "_th", "Stuff": "_st"}
        result = {
            f"{key.upper()}{suffixes[name]}": 100 * quality[name][key] for name in groups for key in ("pq", "sq", "rq")
        }
        return OrderedDict(panoptic_seg=result)


def panoptic_counts(
    target: np.ndarray, segments: Sequence[Mapping[str, Any]], predicted: np.ndarray, categories: Mapping[int, int]
) -> dict[int, np.ndarray]:
    """Match the segments of one image.

    A predicted and a true segment of one category match if their intersection over union exceeds 0.5; void pixels of
    the target do not count. A prediction of which more than half is void, or a crowd of its category, is ignored.

    Args:
        target: id of the true segment of each pixel, (H, W); 0 is void.
        segments: ``id``, ``category_id`` and ``iscrowd`` of the true segments.
        predicted: id of the predicted segment of each pixel, (H, W); 0 is void.
        categories: category of each predicted segment by id.

    Returns:
        For each category: sum of the IoU of matches, number of matches, of unmatched predictions and of unmatched
        true segments.
    """
    counts: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(4))
    pairs, sizes = np.unique(np.stack([target.ravel(), predicted.ravel()]), axis=1, return_counts=True)
    overlap = {(int(t), int(p)): int(n) for (t, p), n in zip(pairs.T, sizes, strict=True)}
    true_area: dict[int, int] = defaultdict(int)
    predicted_area: dict[int, int] = defaultdict(int)
    for (t, p), n in overlap.items():
        true_area[t] += n
        predicted_area[p] += n
    crowds = {segment["category_id"]: segment["id"] for segment in segments if segment.get("iscrowd")}
    true = {segment["id"]: segment["category_id"] for segment in segments if not segment.get("iscrowd")}
    matched_true, matched_predicted = set(), set()
    for (t, p), n in overlap.items():
        if t in true and p in categories and true[t] == categories[p]:
            iou = n / (true_area[t] + predicted_area[p] - n - overlap.get((VOID, p), 0))
            if iou > 0.5:
                counts[true[t]][[IOU, TP]] += (iou, 1)
                matched_true.add(t)
                matched_predicted.add(p)
    for t, category in true.items():
        if t not in matched_true:
            counts[category][FN] += 1
    for p, category in categories.items():
        if p not in matched_predicted and predicted_area[p]:
            ignored = overlap.get((VOID, p), 0) + overlap.get((crowds.get(category, VOID - 1), p), 0)
            if ignored <= predicted_area[p] / 2:
                counts[category][FP] += 1
    return counts


def _average(counts: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the mean qualities over categories, and their number."""
    if not counts:
        return {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}
    iou, tp, fp, fn = np.array(counts).T
    rq = tp / (tp + (fp + fn) / 2)
    sq = iou / np.maximum(tp, 1)
    return {"pq": float((sq * rq).mean()), "sq": float(sq.mean()), "rq": float(rq.mean()), "n": len(counts)}
