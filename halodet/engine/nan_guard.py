"""Policy for training steps with NaN or infinite losses or gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halodet.errors import TrainingStopped

import torch
from torch import Tensor, nn

POLICIES = ("stop", "skip")


class NonFiniteError(TrainingStopped):
    """A training step is not finite and SOLVER.NON_FINITE_POLICY ends training; the model is as before the step."""

    exit_code = 70


@dataclass
class NonFiniteReport:
    """Report of one rank about a non-finite step.

    Args:
        rank: rank that found it.
        reason: what is not finite.
        losses: losses of the batch, as far as they were computed.
        images: file name and id of each image of the batch.
    """

    rank: int
    reason: str
    losses: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[tuple[str, Any]] = ()

    def __str__(self) -> str:
        losses = f" ({', '.join(f'{name}={value:.4g}' for name, value in self.losses.items())})" if self.losses else ""
        images = ", ".join(f"{file} (id {image_id})" for file, image_id in self.images)
        return f"rank {self.rank}: {self.reason}{losses}; images {images}"


class NanGuard:
    """Apply SOLVER.NON_FINITE_POLICY to non-finite steps.

    Args:
        policy: ``"stop"`` (end training) or ``"skip"`` (drop the step).
        max_steps: number of steps that may be skipped before training ends.

    Raises:
        ValueError: ``policy`` is unknown.
    """

    def __init__(self, policy: str = "stop", max_steps: int = 3) -> None:
        if policy not in POLICIES:
            raise ValueError(f"SOLVER.NON_FINITE_POLICY={policy} is invalid: expected one of {', '.join(POLICIES)}.")
        self.policy, self.max_steps, self.count = policy, max_steps, 0

    def handle(self, iteration: int, lrs: Sequence[float], reports: Sequence[NonFiniteReport]) -> str:
        """Count a non-finite step and return the message to log for skipping it.

        Args:
            iteration: iteration of the step.
            lrs: learning rates of the parameter groups.
            reports: reports of the ranks that found something.

        Raises:
            NonFiniteError: training must end.
        """
        self.count += 1
        lr = " to ".join(f"{lr:.4g}" for lr in sorted({min(lrs), max(lrs)}))
        step = f"Non-finite step at iteration {iteration}, learning rate {lr}: {'; '.join(map(str, reports))}."
        if self.policy == "stop":
            fix = "lower SOLVER.BASE_LR, inspect these images, or set SOLVER.NON_FINITE_POLICY=skip"
            raise NonFiniteError(f"{step} Fix: {fix}.")
        if self.count > self.max_steps:
            limit = f"Non-finite step {self.count} exceeds SOLVER.NON_FINITE_MAX_STEPS={self.max_steps}"
            raise NonFiniteError(f"{step} {limit}. Fix: lower SOLVER.BASE_LR.")
        return f"{step} Skipped the step ({self.count} of at most {self.max_steps})."


class NormStatisticsBackup:
    """Backup of the running statistics of a model's norms, which a non-finite forward pass makes useless.

    Args:
        model: the model. Norms without running statistics and frozen norms have nothing to back up.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
        self._copies = [[buffer.clone() for buffer in group] for group in self._buffers()]

    def save(self) -> None:
        """Copy the statistics into the backup."""
        for buffers, copies in zip(self._buffers(), self._copies, strict=True):
            if buffers:
                torch._foreach_copy_(copies, buffers)

    def restore(self) -> None:
        """Copy the backup into the model."""
        for buffers, copies in zip(self._buffers(), self._copies, strict=True):
            if buffers:
                torch._foreach_copy_(buffers, copies)

    def _buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        # Looked up each time: precise BN replaces the tensors. _foreach_copy_ is fast only for tensors of one type.
        buffers = [buffer for norm in self._norms for buffer in norm.buffers(recurse=False)]
        return [b for b in buffers if b.is_floating_point()], [b for b in buffers if not b.is_floating_point()]


def is_non_finite_error(error: Exception) -> bool:
    """Return whether Detectron2 raised ``error`` because of NaN or infinity, as its RPN and its boxes do."""
    return isinstance(error, FloatingPointError) or (
        isinstance(error, AssertionError) and "infinite or NaN" in str(error)
    )
