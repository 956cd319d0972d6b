"""Small JPEG drawings of the annotations of a COCO image."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

__all__ = ["CROWD_COLOR", "MAX_DRAWN", "choose_colors", "draw_annotations", "jpeg_data_uri"]

Color = tuple[int, int, int]

CROWD_COLOR: Color = (160, 160, 160)
MAX_DRAWN = 200  # annotations of one image, the largest first
_LONG_SIDE = 480  # pixels
_MIN_SHORT_SIDE = 8  # pixels
_FILL = 0.35  # opacity of a mask
_MAX_BYTES = 36_000  # of one JPEG
_QUALITIES = (82, 70, 55, 40)
_PALETTE: tuple[Color, ...] = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 99, 216), (245, 130, 49), (145, 30, 180), (70, 240, 240),
    (240, 50, 230), (188, 246, 12), (250, 190, 190), (0, 128, 128), (230, 190, 255), (154, 99, 36), (255, 250, 200),
    (128, 0, 0), (170, 255, 195), (128, 128, 0), (0, 0, 117),
)  # fmt: skip


def choose_colors(ranks: Mapping[int, int], categories: Iterable[int]) -> dict[int, Color]:
    """Return an RGB color of each category of one image; up to 18 of them differ clearly.

    Args:
        ranks: rank of each category id; a category has the color of its rank unless another one of the image has it.
        categories: category ids of the image.
    """
    colors: dict[int, Color] = {}
    free: list[Color] = []
    for category in sorted(set(categories), key=lambda category: ranks[category]):
        free = free or list(_PALETTE)
        usual = _PALETTE[ranks[category] % len(_PALETTE)]
        colors[category] = free.pop(free.index(usual) if usual in free else 0)
    return colors


def draw_annotations(
    image: np.ndarray, annotations: Sequence[Mapping[str, Any]], colors: Mapping[int, Color]
) -> np.ndarray:
    """Resize an image to a long side of 480 pixels, and draw masks, boxes and keypoints on it.

    Args:
        image: (H, W, 3) uint8 BGR image.
        annotations: valid COCO annotations of the image; the ``MAX_DRAWN`` largest are drawn, crowds in grey.
        colors: RGB color of each category id.

    Returns:
        (H', W', 3) uint8 RGB drawing.
    """
    height, width = image.shape[:2]
    scale = _LONG_SIDE / max(height, width)
    size = tuple(max(round(side * scale), min(side, _MIN_SHORT_SIDE)) for side in (width, height))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    drawn = np.ascontiguousarray(resized[:, :, ::-1])
    layer = drawn.copy()
    factor = np.array([size[0] / width, size[1] / height])
    drawable = sorted(annotations, key=lambda annotation: -annotation["area"])[:MAX_DRAWN]
    outlines: list[tuple[list[np.ndarray], Color]] = []
    for annotation in drawable:  # small ones last, on top
        color = CROWD_COLOR if annotation["iscrowd"] else colors[annotation["category_id"]]
        contours = _contours(annotation.get("segmentation"), factor, size)
        if contours:
            cv2.fillPoly(layer, contours, color)
            outlines.append((contours, color))
    drawn = cv2.addWeighted(layer, _FILL, drawn, 1 - _FILL, 0)
    for contours, color in outlines:
        cv2.polylines(drawn, contours, True, color, 1, cv2.LINE_AA)
    for annotation in drawable:
        color = CROWD_COLOR if annotation["iscrowd"] else colors[annotation["category_id"]]
        x, y, w, h = annotation["bbox"]
        start, end = (_pixels(np.array(point), factor, size) for point in ([x, y], [x + w, y + h]))
        cv2.rectangle(drawn, start.tolist(), end.tolist(), color, 2)
        points = np.array(annotation.get("keypoints", ()), dtype=float).reshape(-1, 3)
        for point in _pixels(points[points[:, 2] > 0, :2], factor, size).tolist():
            cv2.circle(drawn, point, 3, color, -1, cv2.LINE_AA)
            cv2.circle(drawn, point, 3, (255, 255, 255), 1, cv2.LINE_AA)
    return drawn


def jpeg_data_uri(image: np.ndarray) -> str:
    """Encode an (H, W, 3) uint8 RGB image of at most 480 pixels as a JPEG data URI of less than 50 kB."""
    picture = Image.fromarray(image)
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality, subsampling=0)  # full color resolution for thin lines
            if buffer.tell() <= _MAX_BYTES:
                return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        picture = picture.resize((max(picture.width // 2, 1), max(picture.height // 2, 1)))


def _pixels(points: np.ndarray, factor: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return the drawing's pixels of image coordinates (..., 2)."""
    return np.clip(np.rint(points * factor), 0, np.array(size) - 1).astype(np.int32)


def _contours(mask: Any, factor: np.ndarray, size: Sequence[int]) -> list[np.ndarray]:
    """Return the polygons of a COCO mask in the drawing's pixels."""
    if not mask:
        return []
    if isinstance(mask, list):
        return [_pixels(np.array(polygon, dtype=float).reshape(-1, 2), factor, size) for polygon in mask]
    rle = mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
    pixels = cv2.resize(mask_util.decode(rle), tuple(size), interpolation=cv2.INTER_NEAREST)
    return list(cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0])
