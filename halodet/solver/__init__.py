"""Optimizer, parameter groups and learning rate scaling."""

from halodet.solver.build import build_optimizer
from halodet.solver.lr_scaling import scale_to_batch

__all__ = ["build_optimizer", "scale_to_batch"]
