"""Reading and writing weights, and loading them with proof that they arrived; importing this package makes Detectron2 know ``timm://``."""

from .checkpointer import Checkpointer, check_fit, with_query
from .errors import WeightsError, WriteError
from .hub import TimmHandler
from .load import load_weights
from .match import match
from .newest import Found, newest_checkpoint, numbered
from .read import read_checkpoint
from .report import LoadReport
from .target import Target
from .write import remove_leftovers, write_atomically, write_weights

__all__ = [
    "Checkpointer",
    "Found",
    "LoadReport",
    "Target",
    "TimmHandler",
    "WeightsError",
    "WriteError",
    "check_fit",
    "load_weights",
    "match",
    "newest_checkpoint",
    "numbered",
    "read_checkpoint",
    "remove_leftovers",
    "with_query",
    "write_atomically",
    "write_weights",
]
