"""Load a checkpoint that must fill the whole model."""

from __future__ import annotations

from halodet.checkpoint.checkpointer import Checkpointer
from halodet.checkpoint.report import LoadReport
from halodet.errors import CheckpointError

from torch import nn


def load_weights(model: nn.Module, weights: str, *, allow_pickle: bool = False, min_loaded: float = 1.0) -> LoadReport:
    """TensorSource ``model`` from the checkpoint ``weights``, a path or a name that Detectron2's PathManager knows, and tell what was filled.

    Args:
        model: to be filled.
        weights: of this very model, when all of it must be filled; else of anything that :class:`Checkpointer` understands.
        allow_pickle: read pickle files that may run code.
        min_loaded: share, 0 to 1, of what the file should fill, in tensors as in parameters.

    Raises:
        CheckpointError: the file cannot be read as a checkpoint, or leaves more of the model as it was; nothing is filled then.
    """
    if not weights:
        raise CheckpointError("MODEL.WEIGHTS is empty: give the path of trained weights")
    checkpointer = Checkpointer(model, min_loaded=min_loaded, exact=min_loaded >= 1.0, allow_pickle=allow_pickle)
    checkpointer.load(weights, checkpointables=[])
    return checkpointer.report
