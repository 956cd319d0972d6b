"""Checks one annotation of an image while training, whatever dataset it came from."""

from __future__ import annotations

from typing import Any

from halodet.data.masks import clean_mask
from halodet.data.values import InvalidAnnotation, show

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode


def validate_annotation(annotation: dict[str, Any], width: int, height: int, *, need_mask: bool) -> dict[str, Any]:
    """The annotation, in Detectron2's form, of an image of ``width`` × ``height`` pixels; its polygons are clipped to the image.

    Raises:
        InvalidAnnotation: its box is not four finite numbers or has no area inside the image, or its mask is missing or broken.
    """
    box = _floats(annotation.get("bbox"))
    if box is None or box.shape != (4,):
        raise InvalidAnnotation(f"its box is {show(annotation.get('bbox'))} and not four finite numbers")
    left, top, right, bottom = BoxMode.convert(box.tolist(), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    if right <= left or bottom <= top:
        raise InvalidAnnotation(f"its box has width {right - left:g} and height {bottom - top:g}")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise InvalidAnnotation(f"its box {box.tolist()} lies outside the image of {width} x {height}")
    if not need_mask:
        return annotation
    return {**annotation, "segmentation": _usable_mask(annotation.get("segmentation"), width, height)}


def _usable_mask(mask: Any, width: int, height: int) -> list[list[float]] | dict[str, Any]:
    if isinstance(mask, dict):
        counts = mask.get("counts")
        text = counts.decode("ascii", errors="replace") if isinstance(counts, bytes) else counts
        clean_mask({"size": list(mask.get("size", ())), "counts": text}, width, height, _quiet)
        return mask_util.frPyObjects(mask, height, width) if isinstance(counts, list) else mask
    if isinstance(mask, (list, tuple)):
        mask = [polygon.tolist() if isinstance(polygon, np.ndarray) else polygon for polygon in mask]
    return clean_mask(mask, width, height, _quiet)


def _quiet(what: str, action: str) -> None:
    """Parts of a mask that is kept are not worth a line on every pass over the data."""


def _floats(values: Any) -> np.ndarray | None:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if np.isfinite(array).all() else None
