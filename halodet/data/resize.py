"""Detectron2's resizing of images whose short side would round down to no pixel at all (8000 x 3, say)."""

from __future__ import annotations

import numpy as np
from detectron2.data import transforms as T

__all__ = ["ResizeScale", "ResizeShortestEdge"]


class _AtLeastOnePixel:
    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class ResizeShortestEdge(_AtLeastOnePixel, T.ResizeShortestEdge):
    """Detectron2's, to at least one pixel a side."""


class ResizeScale(_AtLeastOnePixel, T.ResizeScale):
    """Detectron2's, to at least one pixel a side."""
