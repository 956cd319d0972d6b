"""Detectron2's trainer with COCO evaluation and halodet's optimizers."""

from __future__ import annotations

import contextlib
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import COCOEvaluator
from torch import nn

from ..data import TrainStream
from ..weights import Checkpointer
from .checkpoints import Checkpoints
from .optimizer import build_optimizer
from .signals import StopOnSignal
from .state import RunState


class Trainer(DefaultTrainer):
    """DefaultTrainer with COCO's metrics, SGD or AdamW (SOLVER.OPTIMIZER), and weights that are known to have arrived.

    Args:
        cfg: the run.
        trust_pickle: read pickle files that may run code as MODEL.WEIGHTS.
    """

    def __init__(self, cfg: CfgNode, *, trust_pickle: bool = False) -> None:
        self._trust_pickle = trust_pickle
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, around this package's checkpointer; what makes a run go on as it was, and stop when it is asked to."""
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            min_filled=self.cfg.MODEL.WEIGHTS_MIN_FILLED,
            trust_pickle=self._trust_pickle,
            trainer=weakref.proxy(self),
        )
        state = RunState(self.data_loader, self.checkpointer.model)
        checkpoints = Checkpoints(self.checkpointer, state, self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.SOLVER.CHECKPOINT_KEEP)
        self.signals = StopOnSignal(checkpoints)
        hooks = [hook for hook in super().build_hooks() if hook is not None and not isinstance(hook, PeriodicCheckpointer)]
        # An evaluation that fails, or takes longer than a signal gives, finds the checkpoint written.
        place = next(place for place, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        return [state, *hooks[:place], checkpoints, self.signals, *hooks[place:]]

    def train(self) -> dict | None:
        """As Detectron2's; leaves with an exit code of its own (SystemExit) when it is asked to stop, 75, or cannot write, 74."""
        with self.signals, contextlib.closing(self.data_loader):
            return super().train()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainStream:
        """Batches that depend on SEED alone."""
        return TrainStream(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's own evaluation; predictions are written to OUTPUT_DIR/inference."""
        # Detectron2's faster COCO evaluation stops on a dataset in which nothing is detected; the official one does not.
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"), use_fast_impl=False)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD or AdamW with the rates and decays that SOLVER gives each part of the model."""
        return build_optimizer(cfg, model)
