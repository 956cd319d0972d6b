"""Detectron2's trainer with COCO evaluation and halodet's optimizers."""

from __future__ import annotations

import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from torch import nn

from ..weights import Checkpointer
from .distributed import ddp_anywhere, share_buffers, sync_norms
from .optimizer import build_optimizer


class Trainer(DefaultTrainer):
    """DefaultTrainer with COCO's metrics, SGD or AdamW (SOLVER.OPTIMIZER), and weights that are known to have arrived.

    Args:
        cfg: the run.
        trust_pickle: read pickle files that may run code as MODEL.WEIGHTS.
    """

    def __init__(self, cfg: CfgNode, *, trust_pickle: bool = False) -> None:
        self._trust_pickle = trust_pickle
        with ddp_anywhere():
            super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, around this package's checkpointer."""
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            min_filled=self.cfg.MODEL.WEIGHTS_MIN_FILLED,
            trust_pickle=self._trust_pickle,
            trainer=weakref.proxy(self),
        )
        return super().build_hooks()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's, whose SyncBN also works for several processes on the CPU."""
        return sync_norms(super().build_model(cfg))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Detectron2's, shared by all processes, each of which evaluates the very model that rank 0 saves."""
        share_buffers(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's own evaluation; predictions are written to OUTPUT_DIR/inference."""
        # Detectron2's faster COCO evaluation stops on a dataset in which nothing is detected; the official one does not.
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"), use_fast_impl=False)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD or AdamW with the rates and decays that SOLVER gives each part of the model."""
        return build_optimizer(cfg, model)
