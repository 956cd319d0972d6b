"""COCO evaluation that tolerates unreadable images."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from typing import Any

from halodet.data.bad_images import SKIPPED_KEY, BadImageReport, Skipped
from halodet.data.coco_validator import COCO_MAX_DETECTIONS

from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

logger = logging.getLogger(__name__)


_UNLIMITED = 10**6


class RobustCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator; an unreadable image is evaluated without detections and listed in skipped.json.

    Where there is ground truth but nothing is detected, AP is 0; Detectron2 reports no number.

    Args:
        args: positional arguments of ``COCOEvaluator``.
        report_dir: OUTPUT_DIR, which contains skipped.json.
        default_tasks: what to evaluate if there is no detection from which it follows: ``"bbox"``, ``"segm"``,
            ``"keypoints"``.
        detections_per_image: number of detections that the model returns at most, -1 for all: above COCO's 100, AP is
            that of so many.
        kwargs: further arguments of ``COCOEvaluator``.
    """

    _tasks: Sequence[str] | None
    _coco_api: COCO

    def __init__(
        self,
        *args: Any,
        report_dir: str,
        default_tasks: Sequence[str] = ("bbox",),
        detections_per_image: int = COCO_MAX_DETECTIONS,
        **kwargs: Any,
    ) -> None:
        limit = detections_per_image if detections_per_image >= 0 else _UNLIMITED
        if limit > COCO_MAX_DETECTIONS:
            kwargs.setdefault("max_dets_per_image", limit)
        super().__init__(*args, **kwargs)
        self._default_tasks = sorted(default_tasks)
        self._report = BadImageReport(report_dir)
        self._skipped: list[Skipped] = []

    def reset(self) -> None:
        super().reset()
        self._skipped = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Process a batch; the detections of blank images are dropped."""
        outputs = list(outputs)
        for index, sample in enumerate(inputs):
            if SKIPPED_KEY in sample:
                self._skipped += sample[SKIPPED_KEY]
                outputs[index] = {key: value[:0] for key, value in outputs[index].items()}
        super().process(inputs, outputs)

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, Any]:
        """Return the COCO metrics; the main process also reports the unreadable images."""
        skipped = [record for records in comm.gather(self._skipped) for record in records]
        if skipped:
            os.makedirs(self._report.path.parent, exist_ok=True)
            try:
                self._report.add(0, skipped, evaluation=True)
            except OSError as error:
                logger.warning("Could not write %s: %s", self._report.path, error.strerror or error)
            logger.warning("Evaluated %d unreadable images without detections; see %s", len(skipped), self._report.path)
        return super().evaluate(img_ids)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None) -> None:
        """Evaluate; objects without a mask are ignored in mask AP, as pycocotools ignores crowds."""
        truth, tasks = self._coco_api, self._tasks
        if not self._do_evaluation or all("segmentation" in entry for entry in truth.anns.values()):
            return super()._eval_predictions(predictions, img_ids)
        found = [result for prediction in predictions for result in prediction["instances"]]
        try:
            for task in tasks or self._tasks_from_predictions(found):
                self._tasks, self._coco_api = [task], _crowds_for_missing_masks(truth) if task == "segm" else truth
                super()._eval_predictions(copy.deepcopy(predictions), img_ids)  # it changes the category ids
        finally:
            self._tasks, self._coco_api = tasks, truth

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        return super()._tasks_from_predictions(predictions) if predictions else self._default_tasks

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        return super()._derive_coco_results(coco_eval or self._evaluate_nothing(iou_type), iou_type, class_names)

    def _evaluate_nothing(self, iou_type: str) -> COCOeval:
        """Evaluate no detections, which pycocotools cannot load."""
        nothing = COCO()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        nothing.createIndex()
        coco_eval = COCOevalMaxDets(self._coco_api, nothing, iou_type)
        if iou_type != "keypoints":
            coco_eval.params.maxDets = self._max_dets_per_image
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        return coco_eval


def _crowds_for_missing_masks(truth: COCO) -> COCO:
    """Return ground truth in which objects without a mask are crowds in the form of their box."""

    def complete(entry: dict[str, Any]) -> dict[str, Any]:
        if "segmentation" in entry:
            return entry
        x, y, width, height = entry["bbox"]
        box = [x, y, x + width, y, x + width, y + height, x, y + height]
        return {**entry, "segmentation": [box], "iscrowd": 1}

    copied = COCO()
    copied.dataset = {**truth.dataset, "annotations": [complete(entry) for entry in truth.dataset["annotations"]]}
    copied.createIndex()
    return copied
