"""Training and evaluation of a run."""

from halodet.engine.preemption import PREEMPTED
from halodet.engine.trainer import Trainer

__all__ = ["PREEMPTED", "Trainer"]
