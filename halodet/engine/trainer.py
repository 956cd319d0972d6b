"""Detectron2's trainer with COCO evaluation and halodet's optimizers."""

from __future__ import annotations

import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from torch import nn
from torch.utils.data import DataLoader

from ..data.loader import build_test_loader, build_train_loader
from ..data.skipped import CountingLoader
from ..weights import Checkpointer
from .optimizer import build_optimizer
from .skipped import ReportSkipped, TolerantCOCOEvaluator


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
        """Detectron2's hooks, around this package's checkpointer."""
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            min_filled=self.cfg.MODEL.WEIGHTS_MIN_FILLED,
            trust_pickle=self._trust_pickle,
            trainer=weakref.proxy(self),
        )
        report = ReportSkipped(
            self._trainer.data_loader,
            self.cfg.OUTPUT_DIR,
            max_share=self.cfg.DATALOADER.MAX_SKIPPED,
            checkpoint_period=self.cfg.SOLVER.CHECKPOINT_PERIOD,
        )
        return [report, *super().build_hooks()]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> CountingLoader:
        """Detectron2's loader, which leaves out images that cannot be used."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Detectron2's loader, in which images that cannot be used are blank."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> TolerantCOCOEvaluator:
        """COCO's own evaluation; predictions are written to OUTPUT_DIR/inference."""
        # Detectron2's faster COCO evaluation stops on a dataset in which nothing is detected; the official one does not.
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        return TolerantCOCOEvaluator(dataset_name, output_dir=output_dir, use_fast_impl=False, report_dir=cfg.OUTPUT_DIR)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD or AdamW with the rates and decays that SOLVER gives each part of the model."""
        return build_optimizer(cfg, model)
