"""Recognize boxes that are not written as COCO's (x, y, width, height) in pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halodet.data.annotations import TOLERANCE, box_iou

AGREE = 0.5  # IoU of a box with its mask's, below which one of them is wrong
_SHARE = 0.9  # of the boxes with masks that another format must explain
_MIN_WRONG = 0.1  # share of boxes that are wrong as they are, from which on the whole file has another format
_MIN_BOXES = 4  # without masks
_SMALLEST = 4  # pixels; images in which boxes of up to one pixel are fractions
Box = Sequence[float]


@dataclass(frozen=True)
class BoxFormat:
    """A way to write boxes.

    Attributes:
        name: how the boxes are written.
        to_coco: converts a box in an image of a width and height in pixels to (x, y, width, height).
    """

    name: str
    to_coco: Callable[[Box, int, int], list[float]]


BOX_FORMATS = (
    BoxFormat("x1, y1, x2, y2", lambda b, width, height: [b[0], b[1], b[2] - b[0], b[3] - b[1]]),
    BoxFormat(
        "fractions of the image", lambda b, width, height: [b[0] * width, b[1] * height, b[2] * width, b[3] * height]
    ),
    BoxFormat("their center and size", lambda b, width, height: [b[0] - b[2] / 2, b[1] - b[3] / 2, b[2], b[3]]),
    BoxFormat(
        "center and size in fractions of the image",
        lambda b, width, height: [(b[0] - b[2] / 2) * width, (b[1] - b[3] / 2) * height, b[2] * width, b[3] * height],
    ),
    BoxFormat(
        "x1, y1, x2, y2 in fractions of the image",
        lambda b, width, height: [b[0] * width, b[1] * height, (b[2] - b[0]) * width, (b[3] - b[1]) * height],
    ),
)


def matching_format(box: Box, extent: Box, width: int, height: int) -> BoxFormat | None:
    """Return the format in which a box agrees with the extent of its mask, None if it does in none."""
    return next((form for form in BOX_FORMATS if box_iou(form.to_coco(box, width, height), extent) >= AGREE), None)


def find_box_format(sample: Sequence[tuple[Box, Box | None, int, int]]) -> BoxFormat | None:
    """Return the format of all boxes of a file, None if it is COCO's or unknown.

    Args:
        sample: boxes as they are written, the extent of the mask (x, y, width, height) or None, and the width and
            height of the image in pixels.
    """
    masked = [entry for entry in sample if entry[1] is not None]
    if masked:
        wrong = [entry for entry in masked if box_iou(entry[0], entry[1]) < AGREE]
        if len(wrong) < max(_MIN_WRONG * len(masked), 2):
            return None

        def explained(form: BoxFormat) -> int:
            return sum(box_iou(form.to_coco(box, w, h), extent) >= AGREE for box, extent, w, h in masked)

        best = max(BOX_FORMATS, key=explained)
        return best if explained(best) >= _SHARE * len(masked) else None
    if len(sample) < _MIN_BOXES:
        return None
    if all(max(box) <= 1 and min(box) >= 0 and min(w, h) > _SMALLEST for box, _, w, h in sample):
        corners = all(box[2] > box[0] and box[3] > box[1] for box, *_ in sample)
        overflow = sum(box[0] + box[2] > 1 or box[1] + box[3] > 1 for box, *_ in sample)
        if not overflow:
            return BOX_FORMATS[1]
        return BOX_FORMATS[4] if corners else BOX_FORMATS[3]
    xyxy = BOX_FORMATS[0]
    overflow = sum(box[0] + box[2] > w + TOLERANCE or box[1] + box[3] > h + TOLERANCE for box, _, w, h in sample)
    inside = all(0 < box[2] - box[0] and 0 < box[3] - box[1] and box[2] <= w + TOLERANCE and box[3] <= h + TOLERANCE
                 and min(box) >= -TOLERANCE for box, _, w, h in sample)  # fmt: skip
    return xyxy if inside and overflow >= len(sample) / 4 else None


def are_fractions(sample: Sequence[tuple[Box, Box | None, int, int]]) -> bool:
    """Return whether the masks of a sample, see :func:`find_box_format`, are written in fractions of the image."""
    extents = [(extent, width, height) for _, extent, width, height in sample if extent is not None]
    return bool(extents) and all(
        min(x, y) >= 0 and x + w <= 1 and y + h <= 1 and min(width, height) > _SMALLEST
        for (x, y, w, h), width, height in extents
    )
