"""Hook that writes checkpoints and deletes old ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from halodet.checkpoint import Checkpointer, numbered
from halodet.errors import CheckpointWriteError
from halodet.utils.io import remove_leftovers

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Detectron2's PeriodicCheckpointer for all ranks, since each rank has state of its own in a checkpoint.

    Older checkpoints are deleted only after the new one is complete.

    Args:
        checkpointer: checkpointer that writes on the main process.
        period: number of iterations between two checkpoints.
        max_to_keep: number of newest checkpoints to keep besides ``model_final.pth``; 0 keeps all.
        before_save: functions to call on all ranks before each checkpoint, which bring their state to the main process.

    Raises:
        CheckpointWriteError: on all ranks, if a checkpoint cannot be written; older ones are unchanged.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_to_keep: int = 0,
        before_save: Sequence[Callable[[], object]] = (),
    ) -> None:
        self.checkpointer, self.period, self.max_to_keep = checkpointer, period, max_to_keep
        self._before_save, self._saved_iter = before_save, -1

    def before_train(self) -> None:
        folder = self.checkpointer.save_dir
        if comm.is_main_process():
            for name in remove_leftovers(folder, "model_*.pth"):
                logger.warning("Removed incomplete checkpoint %s", name)
            remove_leftovers(folder, "last_checkpoint")
        has_final = comm.all_gather(os.path.isfile(os.path.join(folder, "model_final.pth")))[0]
        if self.trainer.start_iter >= self.trainer.max_iter and not has_final:
            # The run was killed after its last numbered checkpoint.
            self.trainer.iter -= 1
            self._save("model_final")
            self.trainer.iter += 1

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        names = [f"model_{self.trainer.iter:07d}"] if next_iter % self.period == 0 else []
        names += ["model_final"] if next_iter >= self.trainer.max_iter else []
        if names:
            self._save(*names)

    def save_now(self) -> None:
        """Write a checkpoint of the iteration that has just ended unless there is one; call it on all ranks."""
        if self._saved_iter != self.trainer.iter:
            self._save(f"model_{self.trainer.iter:07d}")

    def prepare(self) -> None:
        """Collect the state of all ranks for :meth:`save_prepared`; call it on all ranks."""
        for function in self._before_save:
            function()

    def save_prepared(self) -> None:
        """Write a checkpoint on the main process alone, with the state that :meth:`prepare` collected."""
        if self._saved_iter != self.trainer.iter:
            error = self._write(f"model_{self.trainer.iter:07d}")
            if error is not None:
                raise error
            self._saved_iter = self.trainer.iter

    def _save(self, *names: str) -> None:
        self.prepare()
        error = self._write(*names) if comm.is_main_process() else None
        error = comm.all_gather(error)[0]
        if error is not None:
            raise error
        self._saved_iter = self.trainer.iter

    def _write(self, *names: str) -> CheckpointWriteError | None:
        try:
            for name in names:
                self.checkpointer.save(name, iteration=self.trainer.iter)
            self._delete_old()
        except CheckpointWriteError as error:
            fix = "free disk space or lower SOLVER.CHECKPOINT_MAX_TO_KEEP, then run again with --resume"
            failure = CheckpointWriteError(f"{str(error).rstrip('.')}. Older checkpoints are unchanged. Fix: {fix}.")
            failure.__cause__ = error
            return failure
        return None

    def _delete_old(self) -> None:
        # Checkpoints of later iterations are of an earlier run in this folder and must not displace new ones.
        newest = f"model_{self.trainer.iter:07d}.pth"
        names = [name for name in numbered(self.checkpointer.save_dir) if (len(name), name) <= (len(newest), newest)]
        for name in names[self.max_to_keep :] if self.max_to_keep else []:
            try:
                os.unlink(os.path.join(self.checkpointer.save_dir, name))
            except OSError as error:
                logger.warning("Could not delete old checkpoint %s: %s", name, error.strerror)
