"""Loading checkpoints, with proof that the weights arrived."""

from .load import WeightsError, load_weights

__all__ = ["WeightsError", "load_weights"]
