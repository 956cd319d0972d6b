"""Detectron2's trainer with COCO evaluation and halodet's optimizers."""

from __future__ import annotations

import os

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from torch import nn

from .optimizer import build_optimizer


class Trainer(DefaultTrainer):
    """DefaultTrainer that evaluates boxes and masks with COCO's metrics and trains with SGD or AdamW (SOLVER.OPTIMIZER)."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's own evaluation; predictions are written to OUTPUT_DIR/inference."""
        # Detectron2's faster COCO evaluation stops on a dataset in which nothing is detected; the official one does not.
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"), use_fast_impl=False)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD or AdamW with the rates and decays that SOLVER gives each part of the model."""
        return build_optimizer(cfg, model)
