"""COCO evaluation that tolerates unreadable images."""

from __future__ import annotations

import logging
import os
from typing import Any

from halodet.data.bad_images import SKIPPED_KEY, BadImageReport, Skipped

from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class RobustCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator; an unreadable image is evaluated without detections and listed in skipped.json.

    Args:
        args: positional arguments of ``COCOEvaluator``.
        report_dir: OUTPUT_DIR, which contains skipped.json.
        kwargs: further arguments of ``COCOEvaluator``.
    """

    def __init__(self, *args: Any, report_dir: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
