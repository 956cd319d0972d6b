"""Checks of single annotations: boxes, polygons and RLE masks.

pycocotools crashes, or allocates all memory, on some broken masks, so every mask is checked before it gets there.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from halodet.data.bad_images import SKIPPED_KEY, Skipped

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

TOLERANCE = 1.0  # pixels; COCO's own boxes and polygons leave the image by rounding
MIN_BOX = 0.1  # pixels; a smaller box is reported
MIN_EXTENT = 1e-3  # pixels; a polygon without extent in one direction is a line
Note = Callable[[str, str], None]  # called with an issue of an annotation that is kept, and the action taken

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


class InvalidAnnotation(Exception):
    """One entry of a dataset cannot be used; the message is the reason."""


def is_int(value: Any) -> bool:
    """Return whether ``value`` is a valid id or size; pycocotools stores ids as doubles."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a valid coordinate; NaN, infinity and integers too long for a double are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9


def _are_numbers(values: Sequence[Any]) -> bool:
    """Return whether all of ``values`` are valid coordinates, in a few C loops for plain floats and ints."""
    if set(map(type, values)) <= {int, float} and -1e9 < min(values) and max(values) < 1e9:
        total = sum(values)
        return total == total  # NaN is not
    return all(map(is_number, values))


def show(value: Any) -> str:
    """Return ``repr(value)``, shortened if it is long."""
    return _short.repr(value)


def validate_record(record: dict[str, Any], *, need_mask: bool) -> None:
    """Remove the invalid annotations of one Detectron2 dataset dict, in place, and clip its polygons to the image.

    The removed annotations are listed in ``record["skipped"]``, from where the mapper reports them. Crowds, which
    training does not use, are not checked.

    Args:
        record: dataset dict with ``file_name``, ``width``, ``height`` and ``annotations``.
        need_mask: whether an annotation without a valid mask is invalid.
    """
    valid, skipped = [], []
    for index, annotation in enumerate(record.get("annotations", ())):
        try:
            if not annotation.get("iscrowd", 0):
                annotation = _validate_annotation(annotation, record["width"], record["height"], need_mask)
            valid.append(annotation)
        except InvalidAnnotation as error:
            skipped.append(Skipped(record["file_name"], str(error), index))
    if "annotations" in record:
        record["annotations"] = valid
    if skipped:
        record[SKIPPED_KEY] = skipped


def _validate_annotation(annotation: dict[str, Any], width: int, height: int, need_mask: bool) -> dict[str, Any]:
    if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:  # rotated boxes are left to the user's mapper
        return annotation
    box = annotation.get("bbox")
    coordinates = box.tolist() if isinstance(box, np.ndarray) else box
    if not isinstance(coordinates, (list, tuple)) or len(coordinates) != 4 or not _are_numbers(coordinates):
        raise InvalidAnnotation(f"bbox={show(box)} is invalid: expected 4 finite numbers")
    x, y, w, h = coordinates
    if annotation["bbox_mode"] == BoxMode.XYXY_ABS:
        w, h = w - x, h - y
    elif annotation["bbox_mode"] != BoxMode.XYWH_ABS:
        x, y, w, h = BoxMode.convert([x, y, w, h], annotation["bbox_mode"], BoxMode.XYWH_ABS)
    check_box([x, y, w, h], width, height)
    if not need_mask:
        return annotation
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        counts = mask.get("counts")
        text = counts.decode("ascii", errors="replace") if isinstance(counts, bytes) else counts
        clean_mask({"size": list(mask.get("size", ())), "counts": text}, width, height)
        if isinstance(counts, list):  # Detectron2 takes compressed RLE only
            mask = mask_util.frPyObjects(mask, height, width)
        return {**annotation, "segmentation": mask}
    if isinstance(mask, (list, tuple)):
        mask = [polygon.tolist() if isinstance(polygon, np.ndarray) else polygon for polygon in mask]
    return {**annotation, "segmentation": clean_mask(mask, width, height)}


def check_box(box: list[float], width: int, height: int) -> None:
    """Check that a box ``(x, y, width, height)`` has an area inside an image of ``width`` x ``height`` pixels.

    Raises:
        InvalidAnnotation: it has none.
    """
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise InvalidAnnotation(f"bbox={box} is invalid: expected a positive size, found {w:g} x {h:g}")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise InvalidAnnotation(f"bbox={box} is outside the image of {width} x {height}")


def clip_polygon(polygon: list[float], width: int, height: int) -> list[float]:
    """Clip a polygon to the image (Sutherland-Hodgman); the result is empty if nothing is left."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    for axis, sign, limit in ((0, 1, 0), (0, -1, width), (1, 1, 0), (1, -1, height)):
        kept = []
        for start, end in zip(points[-1:] + points[:-1], points, strict=True):
            start_side, end_side = sign * (start[axis] - limit), sign * (end[axis] - limit)
            if (start_side < 0) != (end_side < 0):
                share = start_side / (start_side - end_side)
                kept.append(tuple(a + share * (b - a) for a, b in zip(start, end, strict=True)))
            if end_side >= 0:
                kept.append(end)
        points = kept
    return [coordinate for point in points for coordinate in point]


def clean_mask(mask: Any, width: int, height: int, note: Note | None = None) -> list[list[float]] | dict[str, Any]:
    """Return the valid part of a COCO segmentation (polygons in pixels, or RLE) of a ``width`` x ``height`` image.

    Args:
        mask: value of ``segmentation``.
        width: image width in pixels.
        height: image height in pixels.
        note: called for each polygon that is dropped or clipped while others are kept.

    Raises:
        InvalidAnnotation: no part of the mask is valid.
    """
    if isinstance(mask, dict):
        return _clean_rle(mask, width, height)
    if not isinstance(mask, list) or not mask:
        raise InvalidAnnotation(
            f"segmentation={show(mask)} is invalid: expected polygons or RLE"
            if mask is not None
            else "segmentation is missing"
        )
    polygons, errors = [], []
    for number, polygon in enumerate(mask, start=1):
        name = f"polygon {number} of {len(mask)}"
        try:
            polygons.append(_clean_polygon(polygon, name, width, height, note))
        except InvalidAnnotation as error:
            errors.append(f"{name} {error}")
    if not polygons:
        raise InvalidAnnotation(errors[0])
    for error in errors if note else ():
        note(error, "polygon dropped, the others kept")
    return polygons


def mask_box(mask: list[list[float]] | dict[str, Any], width: int, height: int) -> list[float]:
    """Return the box ``[x, y, width, height]`` of a mask that :func:`clean_mask` returned."""
    if isinstance(mask, dict):
        rle = mask_util.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask
        return mask_util.toBbox(rle).tolist()
    xs, ys = [x for polygon in mask for x in polygon[::2]], [y for polygon in mask for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the intersection over union of two boxes ``(x, y, width, height)``."""
    (x, y, w, h), (u, v, s, t) = first, second
    inside = max(min(x + w, u + s) - max(x, u), 0) * max(min(y + h, v + t) - max(y, v), 0)
    union = w * h + s * t - inside
    return inside / union if union > 0 else 0.0


def mask_area(mask: list[list[float]] | dict[str, Any], width: int, height: int) -> float:
    """Return the number of pixels of a mask that :func:`clean_mask` returned."""
    if isinstance(mask, dict):
        return sum(_run_lengths(mask)[1::2])
    return float(mask_util.area(mask_util.merge(mask_util.frPyObjects(mask, height, width))))


def _clean_polygon(polygon: Any, name: str, width: int, height: int, note: Note | None) -> list[float]:
    if not isinstance(polygon, list):
        raise InvalidAnnotation(f"is {show(polygon)}: expected a list of numbers")
    if len(polygon) < 6 or len(polygon) % 2:
        raise InvalidAnnotation(f"has {len(polygon)} numbers: expected an even count of 6 or more")
    if not _are_numbers(polygon):  # pycocotools allocates all memory for some NaNs and for huge coordinates
        bad = next(value for value in polygon if not is_number(value))
        raise InvalidAnnotation(f"contains {show(bad)}: expected finite numbers")
    xs, ys = polygon[::2], polygon[1::2]
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    if right - left < MIN_EXTENT or bottom - top < MIN_EXTENT:
        raise InvalidAnnotation(f"has no area: it is {right - left:.6g} x {bottom - top:.6g} pixels")
    outside = right <= 0 or bottom <= 0 or left >= width or top >= height
    overhang = max(-left, -top, right - width, bottom - height)
    if not outside and overhang <= TOLERANCE:
        return polygon
    clipped = [] if outside else clip_polygon(polygon, width, height)
    if len(clipped) < 6:
        raise InvalidAnnotation(f"is outside the image of {width} x {height}")
    if note:
        note(f"{name} extends {overhang:.6g} pixels outside the image of {width} x {height}", "clipped")
    return clipped


def _clean_rle(rle: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    if rle.get("size") != [height, width]:
        raise InvalidAnnotation(f"RLE size={show(rle.get('size'))} is invalid: expected {[height, width]} of the image")
    counts = _run_lengths(rle)
    if not isinstance(counts, list) or not all(is_int(count) and count >= 0 for count in counts):
        raise InvalidAnnotation(f"RLE counts={show(counts)} is invalid: expected run lengths")
    if sum(counts) != height * width:
        raise InvalidAnnotation(f"RLE counts cover {sum(counts)} pixels: expected {height * width}")
    if not any(counts[1::2]):
        raise InvalidAnnotation("RLE mask has no pixels")
    return {"size": [height, width], "counts": rle["counts"]}


def _run_lengths(rle: dict[str, Any]) -> Any:
    return _decode_counts(rle["counts"]) if isinstance(rle.get("counts"), str) else rle.get("counts")


def _decode_counts(text: str) -> list[int]:
    """Decode the run lengths of a compressed RLE; pycocotools' own decoder reads past the end of a broken text."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 25:
            raise InvalidAnnotation("RLE counts are not valid compressed run lengths")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise InvalidAnnotation("RLE counts are truncated")
    return counts
