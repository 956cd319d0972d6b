"""Hook that reports skipped images and stops training when there are too many."""

from __future__ import annotations

import logging
from typing import Any

from halodet.data.bad_images import BadImageReport, Skipped, SkipTrackingLoader, TooManyBadImages, too_many

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

_PERIOD = 20  # iterations


class BadImageHook(HookBase):
    """Collect from all ranks what the loader skipped; the main process writes it to OUTPUT_DIR/skipped.json.

    The report is written every 20 iterations, before each checkpoint, which contains the counts too, and at the end. A
    resumed run starts with the counts of its checkpoint, as the iterations since then are repeated.

    Args:
        loader: train loader.
        folder: OUTPUT_DIR.
        max_share: fraction of images that may be skipped (DATALOADER.MAX_BAD_IMAGES).
        checkpoint_period: iterations between two checkpoints.

    Raises:
        TooManyBadImages: by ``after_step``, on all ranks.
    """

    def __init__(self, loader: SkipTrackingLoader, folder: str, *, max_share: float, checkpoint_period: int) -> None:
        self._loader = loader
        self._report = BadImageReport(folder)
        self._max_share = max_share
        self._checkpoint_period = checkpoint_period
        self._seen = 0
        self._records: list[Skipped] = []
        self._resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self._report.training_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state

    def before_train(self) -> None:
        if not comm.is_main_process():
            return
        if self.trainer.start_iter == 0:
            self._report.clear()
        elif self._resumed is not None:
            try:
                self._report.restore(self._resumed)
            except OSError as error:
                logger.warning("Could not write %s: %s", self._report.path, error.strerror or error)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        if not last and done % _PERIOD and done % self._checkpoint_period:
            return
        error = comm.all_gather(self.collect())[0]
        if error and last:  # training is complete
            logger.warning("%s", error)
        elif error:
            raise TooManyBadImages(error)

    def collect(self) -> str | None:
        """Write what all ranks have skipped so far; call it on all ranks.

        Returns:
            On the main process, an error message if too many images were skipped.
        """
        for drained in comm.all_gather(self._loader.drain()):
            self._add(*drained)
        if comm.is_main_process():
            return self._write()
        self._seen, self._records = 0, []
        return None

    def after_train(self) -> None:
        # Something is left here only after an error, when the other ranks may be gone.
        if comm.is_main_process():
            self._add(*self._loader.drain())
            self._write()

    def _add(self, seen: int, records: list[Skipped]) -> None:
        self._seen += seen
        self._records += records

    def _write(self) -> str | None:
        try:
            report = self._report.add(self._seen, self._records)
        except OSError as error:
            logger.warning("Could not write %s: %s; will retry", self._report.path, error.strerror or error)
            return None
        self._seen, self._records = 0, []
        return too_many(report, self._max_share)
