"""Conversion of masks to polygons."""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["mask_to_polygons"]


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """Convert a mask to polygons of COCO's format, which pycocotools rasterizes to the same mask.

    Args:
        mask: (H, W) bool.

    Returns:
        One polygon ``[x1, y1, x2, y2, ...]`` for each connected part, along the edges of pixels. A hole is connected to
        the outer border by a cut of zero width.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    x0, y0 = int(columns[0]), int(rows[0])
    crop = mask[y0 : rows[-1] + 1, x0 : columns[-1] + 1].astype(np.uint8)
    # OpenCV follows the centers of pixels: at double resolution, half of its path is the edge between pixels.
    doubled = np.repeat(np.repeat(crop, 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = [_corners((contour[:, 0] + 1) // 2) for contour in contours]
    polygons = []
    for index, (_, _, child, parent) in enumerate(hierarchy[0].tolist()):
        if parent >= 0:
            continue
        ring = rings[index]
        while child >= 0:
            ring = _join(ring, rings[child])
            child = int(hierarchy[0][child][0])
        polygons.append((ring + (x0, y0)).reshape(-1).tolist())
    return polygons


def _corners(path: np.ndarray) -> np.ndarray:
    """Return the corners of a closed (N, 2) path: its points without repetitions and those on a straight line."""
    path = path[(path != np.roll(path, 1, axis=0)).any(axis=1)]
    before, after = path - np.roll(path, 1, axis=0), np.roll(path, -1, axis=0) - path
    return path[(np.sign(before) != np.sign(after)).any(axis=1)]


def _join(ring: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Return the path along a ring and a hole, with a cut from the first corner of the hole to the closest one."""
    i = int(np.abs(ring - hole[0]).sum(axis=1).argmin())
    return np.concatenate([ring[: i + 1], hole, hole[:1], ring[i:]])
