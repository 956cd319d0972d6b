"""One optimizer step: forward and backward passes in the precision asked for, accumulated, and finite or not taken."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from typing import Any

from halodet.engine.nan_guard import (
    Fault,
    KeptStatistics,
    Policy,
    first_non_finite,
    gradient_norm,
    images_of,
    is_non_finite,
)
from halodet.engine.performance import autocast_dtype

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


class Step(SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one, for which a step with NaN or infinite losses or gradients is never taken.

    Losses are looked at before each backward pass, gradients before the optimizer's step, by all ranks together: what one of them finds
    stops, drops or takes back the step of all, as ``policy`` says. Running statistics are then those of before the step, too. That costs
    a copy of them, two waits for the GPU (Detectron2 waits once for each loss) and, with several processes, one number reduced for each
    forward pass. Gradients that only overflow fp16 are the scaler's, which halves its scale and drops the step, until the scale is below 1.

    Args:
        model: returns a dict of losses, each the mean over its batch.
        data_loader: of batches.
        optimizer: a step of it is an iteration.
        accumulate: batches of which the mean of losses and gradients is taken for a step; with DDP, gradients are reduced for the last.
        dtype: what autocast computes in, None for the parameters' own; with fp16, gradients are scaled.
        policy: what is done about a step that is not finite.

    Raises:
        ValueError: ``accumulate`` is less than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        if accumulate < 1:
            raise ValueError(f"SOLVER.GRAD_ACCUM_STEPS is {accumulate}, expected 1 or more")
        self.accumulate, self.dtype, self.policy = accumulate, dtype, policy or Policy()
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type) if dtype == torch.float16 else None
        self.batches = (
            0  # taken from the loader since iteration 0; more than the iterations tell where the run went back
        )
        self._statistics = KeptStatistics(model)
        self._unfinished = False  # whether DDP has been given a forward pass to which no backward pass came

    @classmethod
    def of(cls, cfg: CfgNode, trainer: SimpleTrainer) -> Step:
        """What ``cfg`` asks for, in the place of Detectron2's ``trainer``."""
        solver = cfg.SOLVER
        policy = Policy(solver.NON_FINITE_POLICY, solver.NON_FINITE_MAX_STEPS)
        options = {"accumulate": solver.GRAD_ACCUM_STEPS, "dtype": autocast_dtype(cfg), "policy": policy}
        return cls(trainer.model, trainer.data_loader, trainer.optimizer, **options)

    def run_step(self) -> None:
        """One iteration.

        Raises:
            NonFiniteError: the step is not finite, and the policy is to stop, or its limit is reached.
            RollBack: the policy is to go back.
        """
        if not self.model.training:
            raise RuntimeError(
                "the model is in evaluation mode: something that evaluated it did not put it back into training mode"
            )
        self._statistics.save()
        self.optimizer.zero_grad()
        losses: dict[str, float] = {}
        images: list[tuple[str, Any]] = []
        data_time = 0.0
        for part in range(self.accumulate):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            self.batches += 1
            images += images_of(batch)
            with self._gradients_reduced(now=part == self.accumulate - 1 or self._unfinished):
                total, values, fault, anywhere = self._forward(batch)
                if anywhere:
                    self._unfinished = True
                    return self._give_up(fault)
                total = total / self.accumulate
                (self.scaler.scale(total) if self.scaler else total).backward()
            for name, value in values.items():
                losses[name] = losses.get(name, 0.0) + value / self.accumulate
        self._unfinished = False
        self.after_backward()
        # Gradients are the same on all ranks by now, and so is what is decided about them.
        fault = self._update(losses, images)
        if fault is not None:
            return self._give_up(fault)
        self._write_metrics({name: torch.tensor(value) for name, value in losses.items()}, data_time)

    def _gradients_reduced(self, *, now: bool) -> contextlib.AbstractContextManager:
        # A DDP that still expects the backward pass of a dropped step would reduce in the next one, even inside no_sync, and where the
        # forward pass of one rank has failed that one would not. Reducing the sum once more on the way changes nothing but the rounding.
        alone = now or not isinstance(self.model, DistributedDataParallel)
        return contextlib.nullcontext() if alone else self.model.no_sync()

    def _forward(self, batch: list[dict[str, Any]]) -> tuple[Tensor | None, dict[str, float], Fault | None, bool]:
        """The sum of the losses and each of them, what is wrong with them here, and whether anything is wrong on any rank."""
        losses: dict[str, Tensor] = {}
        reason = ""
        try:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                losses = self.model(batch)
        except (FloatingPointError, AssertionError) as error:
            if not is_non_finite(error):
                raise
            reason = str(error).partition(".")[0].strip(" !")
        if isinstance(losses, Tensor):
            losses = {"total_loss": losses}
        # The numbers and the ranks' common flag come from the GPU together, in the one wait there is here.
        report = torch.stack(
            [loss.detach().float().reshape(()) for loss in losses.values()] + [torch.zeros((), device=self.device)]
        )
        report[-1] = 1.0 if reason else (~report.isfinite()).any()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(report[-1:], op=torch.distributed.ReduceOp.MAX)
        *numbers, anywhere = report.tolist()
        values = dict(zip(losses, numbers, strict=True))
        bad = first_non_finite(values)
        reason = reason or (f"{bad} not finite" if bad else "")
        fault = Fault(comm.get_rank(), reason, values, images_of(batch)) if reason else None
        return sum(losses.values()) if losses else None, values, fault, anywhere > 0

    def _update(self, losses: dict[str, float], images: list[tuple[str, Any]]) -> Fault | None:
        """The optimizer's step, unless the gradients are not finite."""
        if self.scaler is None:
            norm = gradient_norm(self.model)
            if not math.isfinite(norm):
                return Fault(comm.get_rank(), f"the gradients' norm is {norm}", losses, images)
            self.optimizer.step()
            return None
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        scale = self.scaler.get_scale()
        get_event_storage().put_scalar("grad_scale", scale)
        if scale < min(before, 1.0):
            return Fault(
                comm.get_rank(),
                f"gradients are not finite although their scale has come down to {scale:g}",
                losses,
                images,
            )
        return None

    def _give_up(self, fault: Fault | None) -> None:
        """Drop the step: the model is as before it. All ranks come here together, with what each of them found."""
        self._statistics.restore()
        self.optimizer.zero_grad()
        faults = [found for found in comm.all_gather(fault) if found is not None]
        told = self.policy.apply(self.iter, [group["lr"] for group in self.optimizer.param_groups], faults)
        get_event_storage().put_scalar("dropped_steps", self.policy.count)
        if comm.is_main_process():
            logger.warning(told)

    def state_dict(self) -> dict[str, Any]:
        """As Detectron2's trainers', and the number of batches taken from the loader."""
        state = {**super().state_dict(), "batches": self.batches}
        return state if self.scaler is None else {**state, "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of a run in another precision; where data are already being taken, the count of batches goes on."""
        super().load_state_dict(state_dict)
        if self._data_loader_iter_obj is None:
            self.batches = state_dict.get("batches", (state_dict["iteration"] + 1) * self.accumulate)
        if self.scaler is not None and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
