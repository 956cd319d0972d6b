"""Find the annotations that are valid as they are, many at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

from halodet.data.annotations import MIN_BOX, MIN_EXTENT, TOLERANCE
from halodet.data.box_format import AGREE

import numpy as np

_NUMBERS = {int, float}


def find_plain(
    entries: Sequence[Any], sizes: Mapping[int, tuple[int, int]], categories: Collection[int], *, need_masks: bool
) -> list[bool]:
    """Return which annotations are valid without any change, apart from keys that COCO does not have.

    Boxes and polygons are compared with NumPy, since a call per annotation takes most of the time of reading a large
    json. An annotation with RLE is never plain.

    Args:
        entries: values of ``annotations``.
        sizes: width and height in pixels of each usable image.
        categories: category ids.
        need_masks: whether an annotation without polygons is not plain.
    """
    plain = [_is_plain(entry, sizes, categories, need_masks) for entry in entries]
    found = [entry for entry, is_plain in zip(entries, plain, strict=True) if is_plain]
    if not found:
        return plain
    boxes = [entry["bbox"] for entry in found]
    masks = [entry.get("segmentation") or () for entry in found]
    polygons = list(chain.from_iterable(masks))
    if not set(map(type, chain(chain.from_iterable(boxes), chain.from_iterable(polygons)))) <= _NUMBERS:
        return [False] * len(entries)
    try:
        box = np.array(boxes, dtype=np.float64)
        lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
        points = np.fromiter(chain.from_iterable(polygons), np.float64, int(lengths.sum())).reshape(-1, 2)
    except OverflowError:  # an integer of hundreds of digits
        return [False] * len(entries)
    size = np.array([sizes[entry["image_id"]] for entry in found], dtype=np.float64)
    crowd = np.array([entry["iscrowd"] for entry in found], dtype=bool)

    with np.errstate(all="ignore"):  # NaN and infinity compare as not good
        good = _compare(box, masks, lengths, points, size, crowd)
    results = iter(good.tolist())
    return [is_plain and next(results) for is_plain in plain]


def _compare(
    box: np.ndarray, masks: Sequence[Any], lengths: np.ndarray, points: np.ndarray, size: np.ndarray, crowd: np.ndarray
) -> np.ndarray:
    """Return which boxes and polygons are inside their images and agree, (N,).

    Args:
        box: boxes (x, y, width, height), (N, 4).
        masks: list of polygons of each of the N annotations.
        lengths: number of coordinates of each polygon.
        points: points of all polygons, one after the other, (P, 2).
        size: width and height of the image, (N, 2).
        crowd: whether it is a crowd, (N,).
    """
    low, high = box[:, :2], box[:, :2] + box[:, 2:]
    good = (box[:, 2:] >= MIN_BOX).all(1) & _inside(low, high, size)
    counts = np.fromiter(map(len, masks), np.int64, len(masks))
    masked = np.flatnonzero(counts)
    if len(masked):
        starts = np.concatenate([[0], np.cumsum(lengths // 2)[:-1]])
        owner = np.repeat(np.arange(len(masks)), counts)
        polygon_low, polygon_high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
        polygon_good = (polygon_high - polygon_low >= MIN_EXTENT).all(1)
        polygon_good &= _inside(polygon_low, polygon_high, size[owner])
        first = np.concatenate([[0], np.cumsum(counts[masked])[:-1]])
        good[masked] &= np.logical_and.reduceat(polygon_good, first)
        mask_low, mask_high = np.minimum.reduceat(polygon_low, first), np.maximum.reduceat(polygon_high, first)
        iou = _iou(low[masked], high[masked], mask_low, mask_high)
        good[masked] &= crowd[masked] | (iou >= AGREE)
    return good


def _is_plain(entry: Any, sizes: Mapping[int, Any], categories: Collection[int], need_masks: bool) -> bool:
    """Return whether all values but those of the boxes and polygons are COCO's."""
    if type(entry) is not dict:
        return False
    try:
        box, area, number, crowd = entry["bbox"], entry["area"], entry["id"], entry["iscrowd"]
        image_id, category_id = entry["image_id"], entry["category_id"]
    except KeyError:
        return False
    if not (
        type(number) is type(crowd) is type(image_id) is type(category_id) is int
        and image_id in sizes
        and category_id in categories
        and (crowd == 0 or crowd == 1)
        and type(area) in _NUMBERS
        and 0 < area < 1e9
        and type(box) is list
        and len(box) == 4
        and not entry.get("ignore")
    ):
        return False
    mask = entry.get("segmentation")
    if not mask:
        return not need_masks and (mask is None or mask == [])
    if type(mask) is not list:
        return False
    return all(type(polygon) is list and len(polygon) > 5 and not len(polygon) % 2 for polygon in mask)


def _inside(low: np.ndarray, high: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return which boxes are inside their images, up to the tolerance, given two corners, each (N, 2) in pixels."""
    overhang = np.maximum(-low, high - size)
    return ((low < size) & (high > 0) & (overhang <= TOLERANCE)).all(1)


def _iou(low: np.ndarray, high: np.ndarray, other_low: np.ndarray, other_high: np.ndarray) -> np.ndarray:
    """Return the intersection over union of pairs of boxes with positive sizes, (N,)."""
    inside = np.clip(np.minimum(high, other_high) - np.maximum(low, other_low), 0, None).prod(1)
    union = (high - low).prod(1) + (other_high - other_low).prod(1) - inside
    return inside / union
