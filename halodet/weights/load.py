"""Load a checkpoint that must fill the whole model."""

from __future__ import annotations

from torch import nn

from .checkpointer import Checkpointer
from .errors import WeightsError
from .report import LoadReport


def load_weights(model: nn.Module, weights: str, *, trust_pickle: bool = False, min_filled: float = 1.0) -> LoadReport:
    """Fill ``model`` from the checkpoint ``weights``, a path or a name that Detectron2's PathManager knows, and tell what was filled.

    Args:
        model: to be filled.
        weights: of this very model, when all of it must be filled; else of anything that :class:`Checkpointer` understands.
        trust_pickle: read pickle files that may run code.
        min_filled: share, 0 to 1, of what the file should fill, in tensors as in parameters.

    Raises:
        WeightsError: the file cannot be read as a checkpoint, or leaves more of the model as it was; nothing is filled then.
    """
    if not weights:
        raise WeightsError("MODEL.WEIGHTS is empty: give the path of trained weights")
    checkpointer = Checkpointer(model, min_filled=min_filled, exact=min_filled >= 1.0, trust_pickle=trust_pickle)
    checkpointer.load(weights, checkpointables=[])
    return checkpointer.report
