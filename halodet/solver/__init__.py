"""Optimizer, parameter groups and learning rate scaling."""

from halodet.solver.build import build_optimizer, get_optimizer_params
from halodet.solver.lr_scaling import scale_to_batch

__all__ = ["build_optimizer", "get_optimizer_params", "scale_to_batch"]
