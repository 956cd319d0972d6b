"""What to say, and what to do, when losses or gradients are not finite."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halodet.errors import TrainingStopped

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip", "rollback")


class NonFiniteError(TrainingStopped):
    """Losses or gradients are NaN or infinite, and SOLVER.NON_FINITE_POLICY lets training go no further; parameters are as before the step."""

    exit_code = 70


class RollBack(Exception):
    """Asks the trainer to go back to its last checkpoint; the message says why."""


@dataclass
class Fault:
    """What one rank found in one optimizer step.

    Args:
        rank: where.
        reason: what is not finite.
        losses: of the batch it was found in, as far as they were computed.
        images: file name and id of each image of that batch.
    """

    rank: int
    reason: str
    losses: dict[str, float] = field(default_factory=dict)
    images: list[tuple[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        losses = f" ({', '.join(f'{name} {value:.4g}' for name, value in self.losses.items())})" if self.losses else ""
        images = ", ".join(f"{file} (id {image_id})" for file, image_id in self.images)
        return f"{self.reason}{losses} on rank {self.rank} with the images {images}"


def is_non_finite(error: Exception) -> bool:
    """Whether Detectron2 raised ``error`` in a forward pass because of NaN or infinity: its RPN, or its boxes in a cascade."""
    return isinstance(error, FloatingPointError) or (
        isinstance(error, AssertionError) and "infinite or NaN" in str(error)
    )


def images_of(batch: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """File name and id of each image of a batch of Detectron2's."""
    return [(str(entry.get("file_name", "?")), entry.get("image_id", "?")) for entry in batch]


class Policy:
    """SOLVER.NON_FINITE_POLICY: what is done with a step that is not finite, and how often.

    Args:
        action: ``"stop"``, ``"skip"`` (drop the step) or ``"rollback"`` (go back to the last checkpoint).
        limit: how many times a step is dropped, or the run goes back, before it stops.
    """

    def __init__(self, action: str = "stop", limit: int = 3) -> None:
        if action not in POLICIES:
            raise ValueError(f"SOLVER.NON_FINITE_POLICY is {action!r}, expected one of {list(POLICIES)}")
        if limit < 0:
            raise ValueError(f"SOLVER.NON_FINITE_MAX_STEPS is {limit}, expected 0 or more")
        self.action, self.limit, self.count = action, limit, 0

    def apply(self, iteration: int, rates: Sequence[float], faults: Sequence[Fault]) -> str:
        """The sentence to log for a step that is dropped.

        Raises:
            NonFiniteError: the run is to stop.
            RollBack: it is to go back.
        """
        self.count += 1
        rate = " to ".join(f"{rate:.4g}" for rate in sorted({min(rates), max(rates)}))
        told = f"iteration {iteration}, learning rate {rate}: {'; '.join(map(str, faults))}"
        if self.action == "stop":
            raise NonFiniteError(
                f"{told}: lower SOLVER.BASE_LR or look at these images; SOLVER.NON_FINITE_POLICY can be set to skip or rollback"
            )
        if self.count > self.limit:
            raise NonFiniteError(
                f"{told}: this is number {self.count}, and SOLVER.NON_FINITE_MAX_STEPS is {self.limit}: lower SOLVER.BASE_LR"
            )
        if self.action == "rollback":
            raise RollBack(f"{told} ({self.count} of at most {self.limit})")
        return f"{told}: the step is dropped ({self.count} of at most {self.limit})"


class KeptStatistics:
    """A copy of a model's running statistics, which a forward pass that is not finite would spoil for good.

    Args:
        model: whose norms' buffers are kept, those of frozen norms excepted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
        self._copies = [[buffer.clone() for buffer in group] for group in self._groups()]

    @torch.no_grad()
    def save(self) -> None:
        """Copy them."""
        for group, copies in zip(self._groups(), self._copies, strict=True):
            if group:
                torch._foreach_copy_(copies, group)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        for group, copies in zip(self._groups(), self._copies, strict=True):
            if group:
                torch._foreach_copy_(group, copies)

    def _groups(self) -> list[list[torch.Tensor]]:
        """The buffers of floating point and the others, as they are now: what computes exact statistics puts others in their place."""
        buffers = [buffer for norm in self._norms for buffer in norm.buffers(recurse=False)]
        return [[buffer for buffer in buffers if buffer.is_floating_point() == floating] for floating in (True, False)]


def gradient_norm(model: nn.Module) -> float:
    """The L2 norm of all gradients of ``model`` together; not finite where one of them is not."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # PyTorch's get_total_norm came after the oldest version that is supported.
    return (
        torch.linalg.vector_norm(torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])).item()
        if gradients
        else 0.0
    )


def first_non_finite(values: dict[str, float]) -> str:
    """The names of those that are NaN or infinite; empty where all are finite."""
    return ", ".join(name for name, value in values.items() if not math.isfinite(value))


class GoBack(HookBase):
    """Takes a trainer to its last checkpoint and through the iterations since then once more, with the data that comes next.

    A checkpoint that an earlier run left in the same folder is not taken. Everything a checkpoint holds is loaded, as on --resume; the
    data go on. The iterations are made up for before the trainer's own loop goes on, with all hooks.
    """

    def before_train(self) -> None:
        resumed = self.trainer.start_iter > 0
        self._left_over = None if resumed else self._newest()

    def go_back(self, why: str) -> None:
        """Do it, and the iteration that failed as well.

        Raises:
            NonFiniteError: there is no checkpoint of this run yet.
        """
        trainer, newest = self.trainer, self._newest()
        if newest is None or newest == self._left_over:
            raise NonFiniteError(
                f"{why}: there is no checkpoint of this run to go back to yet: lower SOLVER.CHECKPOINT_PERIOD"
            )
        failed = trainer.iter
        for hook in trainer._hooks:
            if isinstance(
                hook, hooks.IterationTimer
            ):  # it counts on an end of every iteration; for other hooks this one has none yet
                hook.after_step()
        trainer.checkpointer.load(newest[0])
        if comm.is_main_process():
            logger.warning(
                f"{why}: going back to {newest[0]}, and on from iteration {trainer.iter + 1} with the data that come next"
            )
        for iteration in range(trainer.iter + 1, failed):
            trainer.iter = iteration
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter = failed
        trainer.before_step()
        trainer.run_step()

    def _newest(self) -> tuple[str, int] | None:
        """The checkpoint that would be taken, and when it was written."""
        checkpointer = self.trainer.checkpointer
        file = checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else ""
        return (file, os.stat(file).st_mtime_ns) if os.path.isfile(file) else None
