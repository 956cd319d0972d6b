"""An exponential moving average of the weights, evaluated and saved beside the raw ones."""

from __future__ import annotations

import logging

from halodet.checkpoint import Checkpointer

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

logger = logging.getLogger(__name__)

FINAL_NAME = "model_final_ema"


def ema_decay(decay: float, updates: int) -> float:
    """The share of the old average that stays at the update after ``updates`` of them: min(decay, (1 + t) / (10 + t)).

    A new average is of weights that are soon wrong, so it first follows the weights closely.

    Source: TensorFlow's ExponentialMovingAverage (its ``num_updates``), which timm and others took up.
    """
    return min(decay, (1 + updates) / (10 + updates))


class EMA(HookBase):
    """Keep the average up to date after each step, and write it as a detector of its own at the end.

    The average begins as the weights after the first step. Parameters are averaged; buffers, such as the statistics of norms, are copied.
    ``average`` belongs into the checkpointer, which then saves and restores it.

    Args:
        model: what is trained.
        decay: share of the old average that stays at each step once there were many, 0 to below 1.
        output_dir: folder that ``model_final_ema.pth`` goes to.
    """

    def __init__(self, model: nn.Module, decay: float, output_dir: str) -> None:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        self._decay, self._output_dir = decay, output_dir
        self.average = AveragedModel(model, multi_avg_fn=self._mix).requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """The detector with the averaged weights."""
        return self.average.module

    def before_train(self) -> None:
        if self.average.n_averaged:
            return
        self.model.load_state_dict(self._trained().state_dict())
        if self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint holds no average of the weights (MODEL.EMA): it begins anew with this iteration."
            )

    def after_step(self) -> None:
        self.average.update_parameters(self._trained())

    def after_train(self) -> None:
        # Here rather than after the last step: the checkpoint of the run, which matters more, is then written.
        if self.trainer.iter >= self.trainer.max_iter:
            _Untagged(self.model, self._output_dir).save(FINAL_NAME, iteration=self.trainer.max_iter - 1)

    def _trained(self) -> nn.Module:
        model = self.trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    @torch.no_grad()
    def _mix(self, averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
        # The count is read where it is, in the CPU's memory: the one handed in is on the device, which would be waited for.
        share = 1 - ema_decay(self._decay, int(self.average.n_averaged))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, share)


class _Untagged(Checkpointer):
    """Writes a file that no run goes on from."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass
