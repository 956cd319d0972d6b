"""The augmentations a config asks for: Detectron2's own, and large-scale jitter put together from them."""

from __future__ import annotations

import math

from halodet.data.masks import clip_polygon
from halodet.data.resize import ResizeScale, ResizeShortestEdge

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Augmentations in the order they are applied in: INPUT's crop, resizing and flip, or large-scale jitter and flip.

    With INPUT.LSJ.ENABLED an image is scaled to fit a square of LSJ.SIZE pixels a side times a factor drawn evenly from LSJ.MIN_SCALE
    to LSJ.MAX_SCALE; a random part of what is larger than the square is kept, and what is smaller is padded with grey (128) on the right
    and at the bottom.

    Source: Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021; Detectron2's
    configs/new_baselines.
    """
    resize, *flips = detection_utils.build_augmentation(cfg, is_train)
    lsj = cfg.INPUT.LSJ
    if is_train and lsj.ENABLED:
        # Detectron2 pads masks given as RLE with seg_pad_value, whose default would make the padding a part of every object.
        crop = FixedSizeCrop((lsj.SIZE, lsj.SIZE), seg_pad_value=0)
        return [ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, lsj.SIZE, lsj.SIZE), crop, *flips]
    crops = [RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)] if is_train and cfg.INPUT.CROP.ENABLED else []
    return [*crops, ResizeShortestEdge(resize.short_edge_length, resize.max_size, resize.sample_style), *flips]


def crops_objects(cfg: CfgNode) -> bool:
    """Whether training sees parts of objects, so that their boxes must be drawn anew around what is left of the masks."""
    return cfg.INPUT.CROP.ENABLED or cfg.INPUT.LSJ.ENABLED


def check_input(cfg: CfgNode) -> None:
    """Check the keys under INPUT and DATALOADER that this package reads.

    Raises:
        ValueError: one of them is out of range, or does not go with another; the message is one sentence.
    """
    lsj, paste = cfg.INPUT.LSJ, cfg.INPUT.COPY_PASTE
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, expected BGR or RGB")
    if not 0 < lsj.MIN_SCALE <= lsj.MAX_SCALE < math.inf:
        raise ValueError(
            f"INPUT.LSJ.MIN_SCALE is {lsj.MIN_SCALE} and MAX_SCALE {lsj.MAX_SCALE}, expected 0 < MIN_SCALE <= MAX_SCALE"
        )
    if lsj.SIZE < 1:
        raise ValueError(f"INPUT.LSJ.SIZE is {lsj.SIZE}, expected pixels along a side, 1 or more")
    if lsj.ENABLED and cfg.INPUT.CROP.ENABLED:
        raise ValueError("INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED both crop: set one of them to False")
    if not 0 < paste.PROBABILITY <= 1:
        raise ValueError(f"INPUT.COPY_PASTE.PROBABILITY is {paste.PROBABILITY}, expected more than 0 and at most 1")
    if paste.ENABLED and not cfg.MODEL.MASK_ON:
        raise ValueError(
            "INPUT.COPY_PASTE.ENABLED needs masks, and MODEL.MASK_ON is False: set one of them to the other's value"
        )
    if paste.ENABLED and cfg.MODEL.KEYPOINT_ON:
        raise ValueError("INPUT.COPY_PASTE.ENABLED does not carry keypoints: set it or MODEL.KEYPOINT_ON to False")
    if not 0 <= cfg.DATALOADER.MAX_BAD_IMAGES <= 1:
        raise ValueError(f"DATALOADER.MAX_BAD_IMAGES is {cfg.DATALOADER.MAX_BAD_IMAGES}, expected a share from 0 to 1")


class _Crop(T.CropTransform):
    """fvcore's, whose cropping of polygons needs shapely, which Detectron2 does not install."""

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        moved = ((polygon - (self.x0, self.y0)).reshape(-1).tolist() for polygon in polygons)
        cropped = (np.array(clip_polygon(polygon, self.w, self.h)).reshape(-1, 2) for polygon in moved)
        return [polygon for polygon in cropped if len(polygon) >= 3]


def _with_polygons(crop: T.CropTransform) -> _Crop:
    return _Crop(crop.x0, crop.y0, crop.w, crop.h, crop.orig_w, crop.orig_h)


class FixedSizeCrop(T.FixedSizeCrop):
    """Detectron2's, which crops polygons without shapely."""

    def _get_crop(self, image: np.ndarray) -> T.Transform:
        return _with_polygons(super()._get_crop(image))


class RandomCrop(T.RandomCrop):
    """Detectron2's, which crops polygons without shapely."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _with_polygons(super().get_transform(image))
