"""Reading and writing weights, and loading them with proof that they arrived; importing this package makes Detectron2 know ``timm://``."""

from .checkpointer import Checkpointer, check_fit, with_query
from .errors import WeightsError
from .hub import TimmHandler
from .load import load_weights
from .match import match
from .read import read_checkpoint
from .report import LoadReport
from .target import Target
from .write import write_weights

__all__ = [
    "Checkpointer",
    "LoadReport",
    "Target",
    "TimmHandler",
    "WeightsError",
    "check_fit",
    "load_weights",
    "match",
    "read_checkpoint",
    "with_query",
    "write_weights",
]
