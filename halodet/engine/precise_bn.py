"""Exact statistics of batch norm (TEST.PRECISE_BN) that do not depend on whether the run was interrupted."""

from __future__ import annotations

import contextlib

from detectron2.config import CfgNode
from detectron2.engine import hooks


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook, with data that follow from the iteration it is at: Detectron2's begin anew where a run goes on.

    Its loader's workers end each time, as those of an evaluation do.
    """

    @classmethod
    def of(cls, cfg: CfgNode, hook: hooks.PreciseBN) -> PreciseBN:
        """In the place of Detectron2's ``hook``, with its model and its loader."""
        return cls(cfg.TEST.EVAL_PERIOD, hook._model, hook._data_loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def update_stats(self) -> None:
        """Take the batches after those of the times before."""
        times_before = self.trainer.iter // self._period if self._period > 0 else 0
        self._data_loader.loader.seek(times_before * self._num_iter)
        with contextlib.closing(self._data_loader):
            super().update_stats()
        self._data_iter = None
