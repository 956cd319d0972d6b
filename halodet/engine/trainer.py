"""Detectron2's trainer with COCO evaluation and halodet's optimizers."""

from __future__ import annotations

import os
import warnings
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator
from torch import nn

from ..weights import Checkpointer
from .finite import GoBack, RollBack
from .optimizer import build_optimizer
from .speed import CompileError, compile_errors, speed_up
from .step import Step
from .stop import log_sentences_only


class Trainer(DefaultTrainer):
    """DefaultTrainer with COCO's metrics, SGD or AdamW (SOLVER.OPTIMIZER), and weights that are known to have arrived.

    Args:
        cfg: the run.
        trust_pickle: read pickle files that may run code as MODEL.WEIGHTS.
    """

    def __init__(self, cfg: CfgNode, *, trust_pickle: bool = False) -> None:
        self._trust_pickle = trust_pickle
        log_sentences_only()
        with warnings.catch_warnings():  # of the AMPTrainer that Detectron2 makes, and Step replaces
            warnings.filterwarnings("ignore", message=".*torch.cuda.amp.GradScaler")
            super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, around this package's step and checkpointer."""
        self._trainer = Step.of(self.cfg, self._trainer)
        self._go_back = GoBack()
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            min_filled=self.cfg.MODEL.WEIGHTS_MIN_FILLED,
            trust_pickle=self._trust_pickle,
            trainer=weakref.proxy(self),
        )
        return [self._go_back, *super().build_hooks()]

    def run_step(self) -> None:
        """One iteration; the last ones again where SOLVER.NON_FINITE is rollback and this one is not finite."""
        try:
            super().run_step()
        except RollBack as why:
            self._go_back.go_back(str(why))
        except compile_errors(self.cfg) as error:
            raise CompileError(error) from error

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's, with what MODEL.TF32, CHANNELS_LAST and COMPILE ask for."""
        return speed_up(cfg, super().build_model(cfg))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's own evaluation; predictions are written to OUTPUT_DIR/inference."""
        # Detectron2's faster COCO evaluation stops on a dataset in which nothing is detected; the official one does not.
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"), use_fast_impl=False)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD or AdamW with the rates and decays that SOLVER gives each part of the model."""
        return build_optimizer(cfg, model)
