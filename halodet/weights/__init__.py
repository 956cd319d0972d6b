"""Reading and writing weights, and loading them with proof that they arrived; importing this package makes Detectron2 know ``timm://``."""

from .errors import WeightsError
from .hub import TimmHandler
from .load import load_weights
from .read import read_checkpoint
from .write import write_weights

__all__ = ["TimmHandler", "WeightsError", "load_weights", "read_checkpoint", "write_weights"]
