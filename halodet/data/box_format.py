"""Recognize boxes that are not written as COCO's (x, y, width, height) in pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halodet.data.annotations import box_iou
from halodet.errors import DatasetError

AGREE = 0.5  # IoU of a box with its mask's, below which one of them is wrong
_SHARE = 0.9  # of the boxes with masks that another format must explain
_MIN_WRONG = 0.1  # share of boxes that are wrong as they are, from which on the whole file has another format
_MIN_BOXES = 4  # without masks
_NEARLY = 0.95  # share of boxes inside their images, without masks
_ROUNDING = 0.01  # of a side of the image, by which a box may leave it
_MIN_CORNERS, _MIN_FAR, _FAR = 10, 0.25, 0.1  # boxes, share of those that leave the image by this share of its side
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
    return _find_without_masks(sample) if len(sample) >= _MIN_BOXES else None


def _find_without_masks(sample: Sequence[tuple[Box, Box | None, int, int]]) -> BoxFormat | None:
    """Return the only format in which nearly all boxes are inside their images; None for COCO's or without evidence.

    Raises:
        DatasetError: boxes are fractions of the image, in more than one possible format.
    """
    boxes = [(box, width, height) for box, _, width, height in sample]

    def share_inside(form: BoxFormat | None, tolerance: float) -> float:
        inside = 0
        for box, width, height in boxes:
            x, y, w, h = form.to_coco(box, width, height) if form else box
            sides = ((x, w, width), (y, h, height))
            inside += all(
                extent > 0 and start >= -tolerance * side and start + extent <= (1 + tolerance) * side
                for start, extent, side in sides
            )
        return inside / len(boxes)

    if all(min(box) >= 0 and max(box) <= 1 and min(width, height) > _SMALLEST for box, width, height in boxes):
        possible = [
            form for form in BOX_FORMATS if "fractions" in form.name and share_inside(form, _ROUNDING) > _NEARLY
        ]
        if len(possible) == 1:
            return possible[0]
        names = " or ".join(form.name for form in possible) or "none that is known"
        raise DatasetError(
            f"bbox={list(boxes[0][0])} is invalid: all boxes are fractions of the image, no mask shows their format "
            f"({names}). Fix: write x, y, width and height in pixels."
        )
    # Boxes of large objects are corners of some box too. Exporters that do not clip leave the image by a little only.
    corners = BOX_FORMATS[0]
    far = 1 - share_inside(None, _FAR)
    if len(boxes) >= _MIN_CORNERS and far >= _MIN_FAR and share_inside(corners, _ROUNDING) == 1:
        return corners
    return None


def are_fractions(sample: Sequence[tuple[Box, Box | None, int, int]]) -> bool:
    """Return whether the masks of a sample, see :func:`find_box_format`, are written in fractions of the image."""
    extents = [(extent, width, height) for _, extent, width, height in sample if extent is not None]
    return bool(extents) and all(
        min(x, y) >= 0 and x + w <= 1 and y + h <= 1 and min(width, height) > _SMALLEST
        for (x, y, w, h), width, height in extents
    )
