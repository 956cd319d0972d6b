"""Conversion of values that exporters write in another form than COCO, where their meaning is unambiguous."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from halodet.data.annotations import is_int, is_number

import numpy as np
import pycocotools.mask as mask_util

Count = Callable[[str, str], None]  # called with a kind of conversion, and the action taken
_INTEGER = re.compile(r"[+-]?\d{1,16}(\.0*)?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_FLAGS = {"false": 0, "no": 0, "true": 1, "yes": 1}
_TEXT = "have numbers that are written as text"


def to_int(value: Any) -> int | None:
    """Return the integer that ``value`` stands for, such as 3.0 or ``"3"``; None if it stands for none."""
    if is_int(value):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    return None


def to_flag(value: Any) -> Any:
    """Return the integer that a flag such as ``"1"``, 0.0 or False stands for; any other value unchanged."""
    if value is None or type(value) is int:
        return value
    flag = int(value) if isinstance(value, bool) else _FLAGS.get(str(value).strip().lower(), to_int(value))
    return value if flag is None else flag


def to_number(value: Any) -> Any:
    """Return the number that a text stands for; any other value unchanged."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) and is_number(float(value)):
        return to_int(value) if to_int(value) is not None else float(value)
    return value


def id_key(value: Any) -> int | str | None:
    """Return the form in which the ids of a json are compared: 1, 1.0 and ``"1"`` are the same; None if it is no id."""
    number = to_int(value)
    if number is not None:
        return number
    is_id = isinstance(value, (int, str)) and not isinstance(value, bool)
    return str(value).strip() or None if is_id else None


def convert_ids(entries: list[Any], report: Count) -> dict[str, int]:
    """Give integer ids to the entries of a list, in place, and return those that replace texts and longer integers.

    Args:
        entries: images or categories.
        report: called with the conversion, if there was one.
    """
    others = [entry for entry in entries if isinstance(entry, dict) and not is_int(entry.get("id"))]
    keys = _distinct_keys([entry.get("id") for entry in others])
    known = [entry["id"] for entry in entries if isinstance(entry, dict) and is_int(entry.get("id"))]
    start = max([0, *known, *(key for key in keys if isinstance(key, int))]) + 1
    texts = dict.fromkeys(key for key in keys if isinstance(key, str))
    new = {text: start + index for index, text in enumerate(texts)}
    converted = [(entry, key) for entry, key in zip(others, keys, strict=True) if key is not None]
    if converted:
        first = converted[0][0]["id"]
        action = "renumbered" if new else "converted"
        report(f"{len(converted)} of {len(entries)} have an id that is no integer, the first is {first!r:.80}", action)
    for entry, key in converted:
        entry["id"] = key if isinstance(key, int) else new[key]
    return new


def _distinct_keys(values: list[Any]) -> list[int | str | None]:
    """Return the keys of ids; texts that differ, such as ``"1"`` and ``"01"``, stay texts if they are one number."""
    keys = [id_key(value) for value in values]
    texts: dict[int, set[str]] = {}
    for key, value in zip(keys, values, strict=True):
        if isinstance(key, int) and isinstance(value, str):
            texts.setdefault(key, set()).add(value.strip())
    several = {key for key, found in texts.items() if len(found) > 1}
    return [
        value.strip() if key in several and isinstance(value, str) else key
        for key, value in zip(keys, values, strict=True)
    ]


def convert_references(entries: list[Any], name: str, new: dict[str, int], report: Count) -> None:
    """Convert the references of annotations to the ids of :func:`convert_ids`, in place.

    Args:
        entries: annotations.
        name: ``"image_id"`` or ``"category_id"``.
        new: result of :func:`convert_ids`.
        report: called with the conversion, if there was one.
    """
    count, first = 0, None
    for entry in entries:
        value = entry.get(name) if isinstance(entry, dict) else None
        if value is None or type(value) is int and abs(value) < 2**53:
            continue
        text = value.strip() if isinstance(value, str) else None
        key = text if text in new else id_key(value)
        target = key if isinstance(key, int) else new.get(key) if key is not None else None
        if target is not None:
            first = value if not count else first
            count += 1
            entry[name] = target
    if count:
        reason = (
            f"{count} of {len(entries)} have {_article(name)} {name} that is no integer, the first is {first!r:.80}"
        )
        report(reason, "renumbered" if new else "converted")


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def convert_annotation(entry: dict[str, Any], count: Count) -> dict[str, Any]:
    """Return an annotation with the values of COCO: flags 0 or 1, numbers, polygons as lists of coordinates."""
    entry = dict(entry)
    for key in ("iscrowd", "ignore"):
        flag = to_flag(entry.get(key))
        if type(entry.get(key)) is not int and flag in (0, 1):
            entry[key] = flag
            count(f"have an {key} that is no integer", "converted")
    for key in ("bbox", "keypoints"):
        if isinstance(entry.get(key), list):
            entry[key] = _numbers(entry[key], count)
    if isinstance(entry.get("area"), str):
        entry["area"] = _numbers([entry["area"]], count)[0]
    if entry.get("bbox") in ([], ""):
        entry["bbox"] = None
    entry["segmentation"] = _convert_mask(entry.get("segmentation"), count)
    return entry


def _numbers(values: list[Any], count: Count) -> list[Any]:
    if not any(isinstance(value, str) for value in values):
        return values
    converted = [to_number(value) for value in values]
    if converted != values:
        count(_TEXT, "converted")
    return converted


def is_empty(mask: Any) -> bool:
    """Return whether a value of ``segmentation`` means that there is no mask."""
    return mask in (None, "", [], [[]], {})


def _convert_mask(mask: Any, count: Count) -> Any:
    """Return a segmentation as a list of polygons or as RLE; None if it is absent."""
    if is_empty(mask):
        return None
    if isinstance(mask, list) and len(mask) == 1 and isinstance(mask[0], dict) and "counts" in mask[0]:
        count("have a list of one RLE", "converted")
        mask = mask[0]
    if isinstance(mask, dict):
        return _convert_rle(mask, count)
    if not isinstance(mask, list):
        return mask
    if all(isinstance(value, (int, float, str)) for value in mask):
        count("have a polygon that is not in a list", "converted")
        mask = [mask]
    elif len(mask) > 2 and all(map(_is_point, mask)):
        mask = [mask]
    polygons = []
    for polygon in mask:
        if isinstance(polygon, list) and polygon and all(map(_is_point, polygon)):
            count("have polygons of points instead of coordinates", "converted")
            polygon = [number for point in polygon for number in _coordinates(point)]
        polygons.append(_numbers(polygon, count) if isinstance(polygon, list) else polygon)
    return polygons


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and not any(isinstance(part, (list, dict)) for part in value)
    ) or (isinstance(value, dict) and {"x", "y"} <= value.keys())


def _coordinates(point: Any) -> list[Any]:
    return [point["x"], point["y"]] if isinstance(point, dict) else point


def _convert_rle(rle: dict[str, Any], count: Count) -> dict[str, Any]:
    converted = dict(rle)
    for key in ("size", "counts"):
        values = rle.get(key)
        if isinstance(values, list) and not all(map(is_int, values)):
            numbers = [to_int(value) for value in values]
            if None not in numbers:
                converted[key] = numbers
                count("have RLE whose numbers are no integers", "converted")
    return converted


def turn_annotation(entry: dict[str, Any], orientation: int, width: int, height: int) -> dict[str, Any]:
    """Return an annotation of an image before rotation, for the image that EXIF has turned on its side.

    Args:
        entry: result of :func:`convert_annotation`, in pixels of the unrotated image.
        orientation: EXIF orientation, 5 to 8.
        width: width of the unrotated image in pixels.
        height: height of the unrotated image in pixels.
    """

    def turn(x: float, y: float) -> tuple[float, float]:
        return (height - y if orientation in (6, 7) else y), (width - x if orientation in (7, 8) else x)

    def turn_flat(values: list[float], step: int) -> list[float]:
        points = [(*turn(*values[i : i + 2]), *values[i + 2 : i + step]) for i in range(0, len(values), step)]
        return [number for point in points for number in point]

    entry = dict(entry)
    box, mask, keypoints = entry.get("bbox"), entry.get("segmentation"), entry.get("keypoints")
    if isinstance(box, list) and len(box) == 4 and all(map(is_number, box)):
        (x1, y1), (x2, y2) = turn(*box[:2]), turn(box[0] + box[2], box[1] + box[3])
        entry["bbox"] = [min(x1, x2), min(y1, y2), abs(x1 - x2), abs(y1 - y2)]
    if isinstance(keypoints, list) and len(keypoints) % 3 == 0 and all(map(is_number, keypoints)):
        # Keypoints are indices of pixels, whose centers are half a pixel further.
        centers = [number + 0.5 * (index % 3 < 2) for index, number in enumerate(keypoints)]
        turned = [number - 0.5 * (index % 3 < 2) for index, number in enumerate(turn_flat(centers, 3))]
        entry["keypoints"] = [
            v for i in range(0, len(keypoints), 3) for v in (turned if keypoints[i + 2] else keypoints)[i : i + 3]
        ]
    if isinstance(mask, list):
        entry["segmentation"] = [
            turn_flat(polygon, 2)
            if isinstance(polygon, list) and len(polygon) % 2 == 0 and all(map(is_number, polygon))
            else polygon
            for polygon in mask
        ]
    return entry


def turn_rle(rle: dict[str, Any], orientation: int) -> dict[str, Any]:
    """Return a valid RLE of an unrotated image, for the image that EXIF has turned on its side."""
    encoded = mask_util.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle
    mask = mask_util.decode(encoded).T
    mask = mask[:, ::-1] if orientation in (6, 7) else mask
    mask = mask[::-1] if orientation in (7, 8) else mask
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}
