"""Drawing of predictions on an image."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import matplotlib.font_manager
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

__all__ = ["draw", "draw_output"]

logger = logging.getLogger(__name__)

_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAexGothic", "NanumGothic", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Hiragino Sans", "Arial Unicode MS",
)  # fmt: skip
_FIRST_CJK = 0x2E80
_MIN_SIDE = 320  # a shorter side is enlarged to this, so that labels are readable
_MAX_SCALE = 4.0
_MAX_SIDE = 4096  # a longer side is shrunk to this: matplotlib needs about 150 bytes per pixel


def draw_output(
    image: np.ndarray,
    output: Mapping[str, Any],
    class_names: Sequence[str],
    stuff_names: Sequence[str] = (),
    *,
    threshold: float,
) -> np.ndarray:
    """Draw the output of any of Detectron2's models for one image: segments, instances, proposals or semantic classes.

    Args:
        image: (H, W, 3) uint8 BGR image.
        output: what the model returns for the image.
        class_names: name of each class of things.
        stuff_names: name of each semantic class.
        threshold: minimum score of instances.

    Returns:
        (H', W', 3) uint8 BGR drawing; see :func:`draw` for its size.
    """
    if "instances" in output and "panoptic_seg" not in output:
        return draw(image, output["instances"], list(class_names), threshold=threshold)
    if "proposals" in output:
        found = output["proposals"]
        scores, classes = found.objectness_logits.sigmoid(), torch.zeros(len(found), dtype=torch.int64)
        found = Instances(found.image_size, pred_boxes=found.proposal_boxes, scores=scores, pred_classes=classes)
        return draw(image, found, ["object"], threshold=threshold)
    segments, infos = output["panoptic_seg"] if "panoptic_seg" in output else (output["sem_seg"].argmax(0), None)
    if max(image.shape) > _MAX_SIDE:
        ratio = _MAX_SIDE / max(image.shape)
        height, width = (max(round(side * ratio), 1) for side in image.shape[:2])
        segments = segments[_nearest(image.shape[0], height)][:, _nearest(image.shape[1], width)]
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    metadata = Metadata(
        thing_classes=list(class_names), stuff_classes=list(stuff_names), stuff_colors=colormap(rgb=True).tolist()
    )
    with _plain_labels([*class_names, *stuff_names]):
        visualizer = Visualizer(np.ascontiguousarray(image[:, :, ::-1]), metadata, scale=_scale(*image.shape[:2]))
        if "panoptic_seg" in output:
            drawn = visualizer.draw_panoptic_seg(segments.cpu(), infos)
        else:
            drawn = visualizer.draw_sem_seg(segments.cpu(), alpha=0.5)
        return np.ascontiguousarray(drawn.get_image()[:, :, ::-1])


def draw(image: np.ndarray, instances: Instances, class_names: list[str], *, threshold: float) -> np.ndarray:
    """Draw boxes, masks, keypoints and labels on an image; each class has a fixed color.

    Args:
        image: (H, W, 3) uint8 BGR image.
        instances: predictions in pixels of the image.
        class_names: name of each class.
        threshold: minimum score.

    Returns:
        (H', W', 3) uint8 BGR drawing: of the image's size, but enlarged up to four times if its short side is below 320
        pixels, and shrunk if its long side is above 4096.
    """
    kept = instances[instances.scores >= threshold].to("cpu")
    boxes, masks = kept.pred_boxes, kept.pred_masks if kept.has("pred_masks") else None
    keypoints = kept.pred_keypoints.clone() if kept.has("pred_keypoints") else None
    old_height, old_width = image.shape[:2]
    image, boxes, masks = _shrink(image, boxes, masks)
    height, width = image.shape[:2]
    if keypoints is not None:
        keypoints[:, :, :2] *= torch.tensor([width / old_width, height / old_height])
    scale = _scale(height, width)
    visualizer = Visualizer(np.ascontiguousarray(image[:, :, ::-1]), Metadata(thing_classes=class_names), scale=scale)
    classes = kept.pred_classes.tolist()
    colors = colormap(rgb=True, maximum=1)
    with _plain_labels(class_names):
        # draw_instance_predictions would choose random colors.
        visualizer.overlay_instances(
            boxes=boxes,
            masks=masks,
            keypoints=keypoints,
            labels=[f"{class_names[k]} {score:.0%}" for k, score in zip(classes, kept.scores.tolist(), strict=True)],
            assigned_colors=[colors[k % len(colors)] for k in classes],
        )
        return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])


@contextlib.contextmanager
def _plain_labels(names: Sequence[str]) -> Iterator[None]:
    """Draw names as they are: "$" starts no formula, and an installed font provides what DejaVu Sans lacks."""
    fonts = [font for font in _CJK_FONTS if font in _installed_fonts()]
    if not fonts:
        _warn_of_font(next((name for name in names if any(ord(letter) >= _FIRST_CJK for letter in name)), None))
    with matplotlib.rc_context({"text.parse_math": False, "font.sans-serif": ["DejaVu Sans", *fonts]}):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # one for each letter and label
            yield


@functools.cache
def _installed_fonts() -> frozenset[str]:
    return frozenset(matplotlib.font_manager.get_font_names())


@functools.cache
def _warn_of_font(name: str | None) -> None:
    if name is not None:
        logger.warning("No installed font can draw class names such as %s. Fix: install one (fonts-noto-cjk).", name)


def _shrink(
    image: np.ndarray, boxes: Boxes, masks: torch.Tensor | None
) -> tuple[np.ndarray, Boxes, torch.Tensor | None]:
    """Shrink the long side to ``_MAX_SIDE`` before Visualizer, which copies the full image many times."""
    old_height, old_width = image.shape[:2]
    ratio = _MAX_SIDE / max(old_height, old_width)
    if ratio >= 1:
        return image, boxes, masks
    height, width = max(round(old_height * ratio), 1), max(round(old_width * ratio), 1)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    boxes = boxes.clone()
    boxes.scale(width / old_width, height / old_height)
    if masks is not None:
        masks = masks[:, _nearest(old_height, height)][:, :, _nearest(old_width, width)]
    return image, boxes, masks


def _nearest(old: int, new: int) -> torch.Tensor:
    """Return the index of the old pixel that each new one shows."""
    return (torch.arange(new) * old) // new


def _scale(height: int, width: int) -> float:
    return min(max(_MIN_SIDE / min(height, width), 1.0), _MAX_SCALE, _MAX_SIDE / max(height, width))
