"""Augmentations: Detectron2's own with fixes for extreme shapes and for polygons, and large-scale jitter."""

from __future__ import annotations

from halodet.data.annotations import clip_polygon

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Build the augmentations of INPUT: crop, resizing and flip, or large-scale jitter and flip.

    With INPUT.LSJ.ENABLED an image is scaled to fit a square of LSJ.SIZE pixels times a factor drawn uniformly from
    LSJ.MIN_SCALE to LSJ.MAX_SCALE. A larger image is cropped at random to the square, a smaller one is padded with grey
    (128) on the right and at the bottom.

    Source: Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021;
    Detectron2's configs/new_baselines.
    """
    resize, *flips = detection_utils.build_augmentation(cfg, is_train)
    lsj = cfg.INPUT.LSJ
    if is_train and lsj.ENABLED:
        # Detectron2 pads RLE masks with seg_pad_value, whose default would make the padding a part of every object.
        crop = FixedSizeCrop((lsj.SIZE, lsj.SIZE), seg_pad_value=0)
        return [ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, lsj.SIZE, lsj.SIZE), crop, *flips]
    crops = [RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)] if is_train and cfg.INPUT.CROP.ENABLED else []
    return [*crops, ResizeShortestEdge(resize.short_edge_length, resize.max_size, resize.sample_style), *flips]


class _AtLeastOnePixel:
    """Round the size of a resized image up to 1 pixel where Detectron2 rounds it down to 0 (8000 x 3, for example)."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class ResizeShortestEdge(_AtLeastOnePixel, T.ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge`` with a minimum output size of 1 pixel."""


class ResizeScale(_AtLeastOnePixel, T.ResizeScale):
    """Detectron2's ``ResizeScale`` with a minimum output size of 1 pixel."""


class _PolygonCrop(T.CropTransform):
    """fvcore's ``CropTransform``, but it clips polygons without shapely, which Detectron2 does not install."""

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        moved = ((polygon - (self.x0, self.y0)).reshape(-1).tolist() for polygon in polygons)
        cropped = (np.array(clip_polygon(polygon, self.w, self.h)).reshape(-1, 2) for polygon in moved)
        return [polygon for polygon in cropped if len(polygon) >= 3]


def _clip_polygons(crop: T.CropTransform) -> _PolygonCrop:
    return _PolygonCrop(crop.x0, crop.y0, crop.w, crop.h, crop.orig_w, crop.orig_h)


class FixedSizeCrop(T.FixedSizeCrop):
    """Detectron2's ``FixedSizeCrop``, which crops polygons without shapely."""

    def _get_crop(self, image: np.ndarray) -> T.Transform:
        return _clip_polygons(super()._get_crop(image))


class RandomCrop(T.RandomCrop):
    """Detectron2's ``RandomCrop`` with a minimum output size of 1 pixel, which crops polygons without shapely."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(height, 1), max(width, 1)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _clip_polygons(super().get_transform(image))
