"""Reports images left out, while training and in evaluations, and stops training when they are too many."""

from __future__ import annotations

import logging
import os
from typing import Any

from halodet.data.bad_images import (
    SKIPPED_FILE,
    SKIPPED_KEY,
    BadImageReport,
    Skipped,
    SkipTrackingLoader,
    TooManyBadImages,
    too_many,
)

from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

logger = logging.getLogger(__name__)

_PERIOD = 20  # iterations


class BadImageHook(HookBase):
    """Collects from all processes what the loader left out, and has the main one write OUTPUT_DIR/skipped.json.

    That happens every 20 iterations, before each checkpoint, which holds the counts too, and at the end. A run that is resumed goes on with
    those of its checkpoint, as the iterations since then come again.

    Args:
        loader: the run's own.
        folder: OUTPUT_DIR.
        max_share: share of images seen that may be left out (DATALOADER.MAX_BAD_IMAGES).
        checkpoint_period: iterations between two checkpoints.

    Raises:
        TooManyBadImages: by ``after_step``, in all processes together.
    """

    def __init__(self, loader: SkipTrackingLoader, folder: str, *, max_share: float, checkpoint_period: int) -> None:
        self._loader = loader
        self._report = BadImageReport(folder)
        self._max_share = max_share
        self._checkpoint_period = checkpoint_period
        self._seen, self._records = 0, []
        self._resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self._report.training()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state

    def before_train(self) -> None:
        if not comm.is_main_process():
            return
        if self.trainer.start_iter == 0:
            self._report.clear()
        elif self._resumed is not None:
            try:
                self._report.seek(self._resumed)
            except OSError as error:
                logger.warning(
                    f"{self._report.path} cannot be written ({error.strerror or error}): it may count some images twice."
                )

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        if not last and done % _PERIOD and done % self._checkpoint_period:
            return
        problem = comm.all_gather(self.collect())[0]
        if problem and last:  # all the work is done
            logger.warning(problem)
        elif problem:
            raise TooManyBadImages(problem)

    def collect(self) -> str | None:
        """Write what all processes have left out so far; to be called in all of them. The main one gets the reason to stop, if any."""
        for seen, records in comm.all_gather(self._loader.take()):
            self._seen += seen
            self._records += records
        if comm.is_main_process():
            return self._write()
        self._seen, self._records = 0, []
        return None

    def after_train(self) -> None:
        # Only after an error is anything left here; the other processes may be gone then.
        if comm.is_main_process():
            seen, records = self._loader.take()
            self._seen += seen
            self._records += records
            self._write()

    def _write(self) -> str | None:
        try:
            content = self._report.add(self._seen, self._records)
        except OSError as error:
            logger.warning(f"{self._report.path} cannot be written ({error.strerror or error}); it is tried again.")
            return None
        self._seen, self._records = 0, []
        return too_many(content, self._max_share)


class RobustCOCOEvaluator(COCOEvaluator):
    """COCO's evaluation, in which an image that cannot be used counts as one without detections, and is named.

    Args:
        report_dir: OUTPUT_DIR, whose skipped.json lists such images.
    """

    def __init__(self, *arguments: Any, report_dir: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._report = BadImageReport(report_dir)
        self._skipped: list[Skipped] = []

    def reset(self) -> None:
        super().reset()
        self._skipped = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for index, sample in enumerate(inputs):
            if SKIPPED_KEY in sample:
                self._skipped += sample[SKIPPED_KEY]
                outputs = [
                    *outputs[:index],
                    {key: value[:0] for key, value in outputs[index].items()},
                    *outputs[index + 1 :],
                ]
        super().process(inputs, outputs)

    def evaluate(self, img_ids: list[int] | None = None) -> dict[str, Any]:
        skipped = [record for records in comm.gather(self._skipped) for record in records]
        if skipped:
            os.makedirs(self._report.path.parent, exist_ok=True)
            try:
                self._report.add(0, skipped, evaluation=True)
            except OSError as error:
                logger.warning(f"{self._report.path} cannot be written ({error.strerror or error}).")
            logger.warning(
                f"Images that could not be used and count as having no detections: {len(skipped)}, see {SKIPPED_FILE}."
            )
        return super().evaluate(img_ids)
