"""Reading and writing weights, and loading them with proof that they arrived."""

from .errors import WeightsError
from .load import load_weights
from .read import read_checkpoint
from .write import write_weights

__all__ = ["WeightsError", "load_weights", "read_checkpoint", "write_weights"]
