"""Load a checkpoint that must fill the whole model."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .errors import WeightsError


class _CompleteCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for which a parameter the file does not fill is an error instead of a line in the log."""

    def _torch_load(self, f: str) -> dict[str, Any]:
        # Before PyTorch 2.6 the default would run code that a checkpoint brings along.
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        # A key of the wrong shape is reported as missing as well.
        unfilled = list(dict.fromkeys([*incompatible.missing_keys, *(key for key, _, _ in incompatible.incorrect_shapes)]))
        if unfilled:
            total = len(self.model.state_dict())
            raise WeightsError(f"{len(unfilled)} of the model's {total} tensors are missing or of another shape, first {unfilled[0]}")
        return incompatible


def load_weights(model: nn.Module, weights: str) -> None:
    """Fill every parameter and buffer of ``model`` from the checkpoint ``weights``, a path or a URL that Detectron2 knows.

    Raises:
        WeightsError: the file cannot be read as a checkpoint, or leaves a part of the model as it was.
    """
    try:
        _CompleteCheckpointer(model).load(weights)
    except WeightsError as error:
        raise WeightsError(f"MODEL.WEIGHTS {weights} does not fit the config: {error}; use the config it was trained with.") from error
    except Exception as error:  # unpickling an arbitrary file raises nearly anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise WeightsError(f"MODEL.WEIGHTS {weights} cannot be read as a checkpoint ({reason}).") from error
