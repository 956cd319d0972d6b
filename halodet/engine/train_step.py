"""Trainer for one optimizer step: mixed precision, gradient accumulation and a guard against non-finite steps."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from typing import Any

from halodet.engine.nan_guard import NanGuard, NonFiniteReport, NormStatisticsBackup, is_non_finite_error
from halodet.errors import ConfigError

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


class GradAccumTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one, with gradient accumulation, that never takes a non-finite step.

    Losses are checked before each backward pass and gradients before the optimizer step. All ranks decide together: a
    non-finite value on one rank stops or skips the step of all, and restores the running statistics of the norms. With
    fp16, the scaler skips steps whose gradients overflow; they count as non-finite once the scale falls below 1.

    Args:
        model: model that returns a dict of losses, each the mean over its batch.
        data_loader: iterable of batches.
        optimizer: optimizer; one step of it is one iteration.
        accum_steps: number of batches whose losses and gradients are averaged for one step.
        dtype: autocast dtype; None for the dtype of the parameters.
        guard: policy for non-finite steps.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        accum_steps: int = 1,
        dtype: torch.dtype | None = None,
        guard: NanGuard | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accum_steps, self.dtype, self.guard = accum_steps, dtype, guard or NanGuard()
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type) if dtype == torch.float16 else None
        self._statistics = NormStatisticsBackup(model)
        self._ddp_awaits_backward = False

    def run_step(self) -> None:
        """Run one iteration.

        Raises:
            NonFiniteError: the step is not finite, and the policy ends training.
        """
        if not self.model.training:
            raise RuntimeError("The model is in evaluation mode. Fix: call model.train() after evaluating it.")
        self._statistics.save()
        self.optimizer.zero_grad()
        losses: dict[str, float] = {}
        images: list[tuple[str, Any]] = []
        data_time = 0.0
        for index in range(self.accum_steps):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            images += _image_ids(batch)
            with self._ddp_context(last=index == self.accum_steps - 1):
                total, values, report, any_rank = self._forward(batch)
                if any_rank:
                    self._ddp_awaits_backward = True
                    return self._skip_step(report)
                total = total / self.accum_steps
                (self.scaler.scale(total) if self.scaler else total).backward()
            for name, value in values.items():
                losses[name] = losses.get(name, 0.0) + value / self.accum_steps
        self._ddp_awaits_backward = False
        self.after_backward()
        reason = self._update()  # the same on all ranks, as the gradients are
        if reason:
            return self._skip_step(NonFiniteReport(comm.get_rank(), reason, losses, images))
        self._write_metrics({name: torch.tensor(value) for name, value in losses.items()}, data_time)

    def _ddp_context(self, *, last: bool) -> contextlib.AbstractContextManager:
        # Gradients are reduced with the last batch, and also in the step after a skipped one: DDP then still waits for
        # a backward pass and would reduce even inside no_sync, but not on a rank whose forward pass raised.
        if last or self._ddp_awaits_backward or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _forward(
        self, batch: list[dict[str, Any]]
    ) -> tuple[Tensor | None, dict[str, float], NonFiniteReport | None, bool]:
        """Return the sum of the losses, their values, this rank's report and whether any rank has one."""
        losses: dict[str, Tensor] = {}
        reason = ""
        try:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                losses = self.model(batch)
        except (FloatingPointError, AssertionError) as error:
            if not is_non_finite_error(error):
                raise
            reason = str(error).partition(".")[0].strip(" !")
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"Batch normalization has one value per channel ({error}). Fix: more or larger images per GPU, or "
                "NORM GN or FrozenBN (MODEL.HALONET.NORM, MODEL.FPN.NORM)."
            ) from error
        if isinstance(losses, Tensor):
            losses = {"total_loss": losses}
        # One transfer from the GPU for all losses and the flag that the ranks share.
        flag = torch.zeros((), device=self.device)
        values = torch.stack([*(loss.detach().float().reshape(()) for loss in losses.values()), flag])
        values[-1] = 1.0 if reason else (~values.isfinite()).any()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values[-1:], op=torch.distributed.ReduceOp.MAX)
        *numbers, any_rank = values.tolist()
        named = dict(zip(losses, numbers, strict=True))
        names = ", ".join(name for name, value in named.items() if not math.isfinite(value))
        reason = reason or (f"{names} is not finite" if names else "")
        report = NonFiniteReport(comm.get_rank(), reason, named, _image_ids(batch)) if reason else None
        return sum(losses.values()) if losses else None, named, report, any_rank > 0

    def _update(self) -> str:
        """Step the optimizer; return the reason if the gradients are not finite, else an empty string."""
        if self.scaler is None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients).item()
            if not math.isfinite(norm):
                return f"the gradient norm is {norm}"
            self.optimizer.step()
            return ""
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        scale = self.scaler.get_scale()
        get_event_storage().put_scalar("grad_scale", scale)
        return f"fp16 gradients overflow at a scale of {scale:g}" if scale < min(before, 1.0) else ""

    def _skip_step(self, report: NonFiniteReport | None) -> None:
        """Restore the model to its state before the step. Called on all ranks, each with its own report."""
        self._statistics.restore()
        self.optimizer.zero_grad()
        reports = [found for found in comm.all_gather(report) if found is not None]
        message = self.guard.handle(self.iter, [group["lr"] for group in self.optimizer.param_groups], reports)
        get_event_storage().put_scalar("dropped_steps", self.guard.count)
        if comm.is_main_process():
            logger.warning(message)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.scaler is None else {**state, "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, also one of another precision."""
        super().load_state_dict(state_dict)
        if self.scaler is not None and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])


def _image_ids(batch: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(str(sample.get("file_name", "?")), sample.get("image_id", "?")) for sample in batch]
