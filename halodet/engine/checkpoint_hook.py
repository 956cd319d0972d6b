"""When checkpoints are written and which of them stay; a disk that is full stops the run, with what it has."""

from __future__ import annotations

import logging
import os
import shutil

from halodet.checkpoint import Checkpointer, numbered
from halodet.engine.bad_image_hook import BadImageHook
from halodet.engine.resume_state import RunState
from halodet.errors import CheckpointWriteError
from halodet.utils.io import remove_leftovers

import torch
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

CANNOT_WRITE = CheckpointWriteError.exit_code


class Checkpoints(PeriodicCheckpointer):
    """Detectron2's hook, in all processes of a run, with the state of each.

    A run that cannot write a checkpoint, or has no room for two before it begins, says so in one sentence and ends with exit code 74.

    Args:
        checkpointer: writes them.
        state: gathered from all processes before each is written.
        report: what was left out, likewise.
        period: iterations from one to the next.
        keep: how many stay, the newest; 0 for all. The final one stays besides.
    """

    def __init__(
        self, checkpointer: Checkpointer, state: RunState, report: BadImageHook, period: int, keep: int = 0
    ) -> None:
        super().__init__(checkpointer, period)
        self.state, self.report, self.keep, self.saved = state, report, keep, -1
        self._failed = False

    def before_train(self) -> None:
        super().before_train()
        problem = None
        if comm.is_main_process():
            for name in remove_leftovers(self.checkpointer.save_dir, "model_*.pth"):
                logger.warning("Removed %s, which a run that was stopped left half written.", name)
            remove_leftovers(self.checkpointer.save_dir, "last_checkpoint")
            problem = self._no_room()
        self._stop_on(problem)
        final = os.path.join(self.checkpointer.save_dir, "model_final.pth")
        # A run that was killed between its last two checkpoints has nothing left to do but this.
        if self.trainer.start_iter >= self.max_iter and not comm.all_gather(os.path.isfile(final))[0]:
            self.trainer.iter -= 1
            self._save(["model_final"])
            self.trainer.iter += 1

    def after_step(self) -> None:
        iteration = self.trainer.iter
        final = iteration >= self.max_iter - 1
        if (iteration + 1) % self.period == 0 or final:
            self._save([f"model_{iteration:07d}"] * ((iteration + 1) % self.period == 0) + ["model_final"] * final)

    def after_train(self) -> None:
        if self._failed:  # hooks after this one may go on to an evaluation
            raise SystemExit(CANNOT_WRITE)

    def save_now(self) -> None:
        """Write a checkpoint of the iteration that has just ended, unless there is one; in all processes at once."""
        if self.saved != self.trainer.iter:
            self._save([f"model_{self.trainer.iter:07d}"])

    def prepare(self) -> None:
        """Until the next iteration, let ``save_prepared`` do what ``save_now`` does; in all processes at once."""
        self.state.gather()
        self.report.collect()

    def save_prepared(self) -> None:
        """As ``save_now``, in the first process alone: weights must not have changed since ``prepare``."""
        if self.saved != self.trainer.iter:
            problem = self._write([f"model_{self.trainer.iter:07d}"])
            if problem is not None:
                logger.error(problem)
                raise SystemExit(CANNOT_WRITE)
            self.saved = self.trainer.iter

    def _save(self, names: list[str]) -> None:
        self.state.gather()
        self.report.collect()
        self._stop_on(self._write(names) if comm.is_main_process() else None)
        self.saved = self.trainer.iter

    def _write(self, names: list[str]) -> str | None:
        """Write checkpoints and remove old ones; returns what is wrong where that fails."""
        try:
            for name in names:
                self.checkpointer.save(name, iteration=self.trainer.iter)
            self._remove_old()
        except CheckpointWriteError as error:
            return self._told(str(error).rstrip("."))
        return None

    def _remove_old(self) -> None:
        # Later ones are of an earlier run in this folder, or could not be read: what has just been written must not give way to them.
        reached = f"model_{self.trainer.iter:07d}.pth"
        names = [name for name in numbered(self.checkpointer.save_dir) if (len(name), name) <= (len(reached), reached)]
        for name in names[self.keep :] if self.keep else []:
            try:
                os.unlink(os.path.join(self.checkpointer.save_dir, name))
            except OSError as error:
                logger.warning(
                    "%s cannot be removed (%s): it stays, beside the %d to keep.", name, error.strerror, self.keep
                )

    def _told(self, reason: str) -> str:
        goes_on = os.path.basename(self.checkpointer.get_checkpoint_file())
        return (
            f"{reason}, and a checkpoint takes about {_mib(self._size())}: make room, or keep fewer with SOLVER.CHECKPOINT_MAX_TO_KEEP; "
            + (
                f"the older ones are as they were, and --resume goes on from {goes_on}"
                if goes_on
                else "none was written before"
            )
        )

    def _no_room(self) -> str | None:
        size, free = self._size(), shutil.disk_usage(self.checkpointer.save_dir).free
        count = len(range(self.trainer.start_iter, self.trainer.max_iter, self.period)) + 1
        needed = size if self.checkpointer.has_checkpoint() else 2 * size
        if free < needed:
            return (
                f"OUTPUT_DIR {self.checkpointer.save_dir} has {_mib(free)} free, and a checkpoint takes about {_mib(size)}, the last one "
                f"and the next {_mib(2 * size)}: make room, or set OUTPUT_DIR to a folder with more"
            )
        if not self.keep and free < count * size:
            logger.warning(
                "About %d checkpoints of %s each are to come, and OUTPUT_DIR has %s free: SOLVER.CHECKPOINT_MAX_TO_KEEP 2 keeps the newest two.",
                count,
                _mib(size),
                _mib(free),
            )
        return None

    def _size(self) -> int:
        """Bytes of a checkpoint, roughly: the weights, their average, and what the optimizer keeps, or will keep, of each it trains."""
        optimizer = self.trainer.optimizer
        kept = sum(
            _bytes(value)
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        if not kept:
            trained = sum(_bytes(parameter) for group in optimizer.param_groups for parameter in group["params"])
            momentum = any(group.get("momentum") for group in optimizer.param_groups)
            kept = trained * (2 if "betas" in optimizer.param_groups[0] else int(momentum))
        modules = [
            self.checkpointer.model,
            *(part for part in self.checkpointer.checkpointables.values() if isinstance(part, nn.Module)),
        ]
        return kept + sum(_bytes(value) for module in modules for value in module.state_dict().values())

    def _stop_on(self, problem: str | None) -> None:
        """End all processes where the first one has a problem; it alone tells which."""
        if problem is not None:
            logger.error(problem)
        self._failed = comm.all_gather(problem is not None)[0]
        if self._failed:
            raise SystemExit(CANNOT_WRITE)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
