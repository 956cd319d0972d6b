"""Class names of a checkpoint, and the rows of the predictors that belong to each class."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_KEY = "classes"
# The predictors of Detectron2's R-CNNs and RetinaNet with the order of their rows, for K classes.
_ROWS = {
    re.compile(r"^roi_heads\.box_predictor(\.\d+)?\.cls_score\.(weight|bias)$"): "K, background",
    re.compile(r"^roi_heads\.box_predictor(\.\d+)?\.bbox_pred\.(weight|bias)$"): "K x 4",
    re.compile(r"^roi_heads\.mask_head\.predictor\.(weight|bias)$"): "K x 1",
    re.compile(r"^head\.cls_score\.(weight|bias)$"): "anchors x K",
    # PointRend's also take one input per class.
    re.compile(r"^roi_heads\.mask_head\.(coarse_head\.prediction|point_head\..*)\.(weight|bias)$"): "PointRend",
}


def classes_metadata(classes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return metadata of a checkpoint with its classes, ``{"id": dataset id, "name": name}`` each."""
    return {_KEY: json.dumps([{"id": entry["id"], "name": entry["name"]} for entry in classes], default=int)}


def classes_of(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the classes that a checkpoint names, in the order of its outputs; None if it names none."""
    try:
        classes = json.loads((checkpoint.get("metadata") or {})[_KEY])
        return [{"id": int(entry["id"]), "name": str(entry["name"])} for entry in classes]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None  # metadata of another program


def show_classes(names: Sequence[str], count: int = 8) -> str:
    """Return the first ``count`` names in brackets, and the number of the others."""
    more = f", ... {len(names) - count} more" if len(names) > count else ""
    return f"[{', '.join(map(str, names[:count]))}{more}]"


def is_predictor(name: str) -> bool:
    """Return whether a tensor has rows of its own for each class, in Detectron2's R-CNNs and RetinaNet."""
    return any(pattern.match(name) for pattern in _ROWS)


def select_classes(name: str, value: Tensor, old: Sequence[str], new: Sequence[str], model_rows: int) -> Tensor | None:
    """Return the rows of a predictor for the classes ``new``, from those for ``old``.

    Args:
        name: name of the tensor in the model.
        value: tensor in the file.
        old: class names of the file.
        new: class names of the model.
        model_rows: number of rows in the model.

    Returns:
        The tensor for ``new``; ``value`` itself if it has no rows for each class; None if a class is not in ``old``, a
        name is used twice, the number of rows does not follow from that of ``old``, or the predictor is PointRend's.
    """
    form = next(form for pattern, form in _ROWS.items() if pattern.match(name))
    if form == "PointRend":
        return None
    rows, count = len(value), len(old)
    agnostic = {"K x 4": 4, "K x 1": 1}.get(form)
    if rows == agnostic and (count > 1 or rows == model_rows != agnostic * len(new)):
        return value
    expected = {"K, background": count + 1, "K x 4": 4 * count, "K x 1": count}.get(form, rows // count * count)
    if rows != expected or not set(new) <= set(old) or len(set(old)) < count or len(set(new)) < len(new):
        return None
    index = torch.tensor([old.index(entry) for entry in new], device=value.device)
    if form == "K, background":
        return value[torch.cat((index, index.new_tensor([count])))]
    if form == "anchors x K":
        return value.unflatten(0, (-1, count))[:, index].flatten(0, 1)
    return value.unflatten(0, (count, -1))[index].flatten(0, 1)
