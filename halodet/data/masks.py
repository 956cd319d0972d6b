"""Checks masks of a user's COCO json: pycocotools crashes, or takes all memory, on some that are broken."""

from __future__ import annotations

from typing import Any

from halodet.data.values import TOLERANCE, InvalidAnnotation, Note, is_int, is_number, show

import pycocotools.mask as mask_util


def clip_polygon(polygon: list[float], width: int, height: int) -> list[float]:
    """The part of the polygon inside the image (Sutherland and Hodgman); empty if there is none."""
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


def _clean_polygon(polygon: Any, name: str, width: int, height: int, note: Note) -> list[float]:
    if not isinstance(polygon, list):
        raise InvalidAnnotation(f"is {show(polygon)} and not a list of numbers")
    if len(polygon) < 6 or len(polygon) % 2:
        raise InvalidAnnotation(f"has {len(polygon)} numbers, not an even count of 6 or more")
    if not all(map(is_number, polygon)):  # pycocotools takes all memory for some NaNs and for huge coordinates
        raise InvalidAnnotation(
            f"has {show(next(value for value in polygon if not is_number(value)))} among its coordinates"
        )
    xs, ys = polygon[::2], polygon[1::2]
    if max(xs) <= 0 or max(ys) <= 0 or min(xs) >= width or min(ys) >= height:
        raise InvalidAnnotation(f"lies outside the image of {width} x {height}")
    overhang = max(-min(xs), -min(ys), max(xs) - width, max(ys) - height)
    if overhang <= TOLERANCE:
        return polygon
    clipped = clip_polygon(polygon, width, height)
    if len(clipped) < 6:
        raise InvalidAnnotation(f"lies outside the image of {width} x {height}")
    note(f"{name} reaches {overhang:.6g} pixels out of the image of {width} x {height}", "clipped")
    return clipped


def _rle_counts(text: str) -> list[int]:
    """Run lengths of a compressed RLE. pycocotools' own reader runs past the end of a broken text."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 25:
            raise InvalidAnnotation("RLE 'counts' is not a compressed run length text")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise InvalidAnnotation("RLE 'counts' is cut short")
    return counts


def _run_lengths(rle: dict[str, Any]) -> Any:
    return _rle_counts(rle["counts"]) if isinstance(rle.get("counts"), str) else rle.get("counts")


def _clean_rle(rle: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    if rle.get("size") != [height, width]:
        raise InvalidAnnotation(
            f"RLE 'size' is {show(rle.get('size'))}, but the image has height and width {[height, width]}"
        )
    counts = _run_lengths(rle)
    if not isinstance(counts, list) or not all(is_int(count) and count >= 0 for count in counts):
        raise InvalidAnnotation(f"RLE 'counts' is {show(counts)} and not run lengths")
    if sum(counts) != height * width:
        raise InvalidAnnotation(f"RLE 'counts' cover {sum(counts)} pixels of {height * width}")
    if not any(counts[1::2]):
        raise InvalidAnnotation("RLE has no pixel in it")
    return {"size": [height, width], "counts": rle["counts"]}


def clean_mask(mask: Any, width: int, height: int, note: Note) -> list[list[float]] | dict[str, Any]:
    """The usable part of a COCO segmentation (polygons in pixels, or RLE) of an image of ``width`` × ``height`` pixels.

    What is dropped or clipped of a mask that is kept is told to ``note``.

    Raises:
        InvalidAnnotation: nothing of it can be used.
    """
    if isinstance(mask, dict):
        return _clean_rle(mask, width, height)
    if not isinstance(mask, list) or not mask:
        raise InvalidAnnotation("'segmentation' is " + (show(mask) if mask is not None else "missing"))
    polygons, wrong = [], []
    for number, polygon in enumerate(mask, start=1):
        name = f"polygon {number} of {len(mask)}"
        try:
            polygons.append(_clean_polygon(polygon, name, width, height, note))
        except InvalidAnnotation as error:
            wrong.append(f"{name} {error}")
    if not polygons:
        raise InvalidAnnotation(wrong[0])
    for what in wrong:
        note(what, "polygon dropped, the others kept")
    return polygons


def mask_area(mask: list[list[float]] | dict[str, Any], width: int, height: int) -> float:
    """Pixels of a mask that ``clean_mask`` returned."""
    if isinstance(mask, dict):
        return sum(_run_lengths(mask)[1::2])
    return float(mask_util.area(mask_util.merge(mask_util.frPyObjects(mask, height, width))))
