"""Drawing detections on an image."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

__all__ = ["draw"]

_READABLE = 320  # a shorter side is enlarged to this many pixels, so that labels can be read
_MAX_ENLARGED = 4.0
_MAX_SIDE = 4096  # a longer side is shrunk to this: matplotlib takes about 150 bytes for each pixel


def draw(image_bgr: np.ndarray, instances: Instances, class_names: list[str], *, threshold: float) -> np.ndarray:
    """Draw the boxes, masks and labels of the instances that score at least ``threshold`` on an (H, W, 3) uint8 BGR image.

    Returns a uint8 BGR drawing: of the image's size, except that an image whose short side is below 320 pixels is enlarged (four times
    at most) and one whose long side is above 4096 pixels is shrunk. Each class keeps its colour from image to image.

    Raises:
        IndexError: a predicted class has no entry in ``class_names``.
    """
    kept = instances[instances.scores >= threshold].to("cpu")
    boxes, masks = kept.pred_boxes, kept.pred_masks if kept.has("pred_masks") else None
    image_bgr, boxes, masks = _shrink(image_bgr, boxes, masks)
    height, width = image_bgr.shape[:2]
    scale = min(max(_READABLE / min(height, width), 1.0), _MAX_ENLARGED, _MAX_SIDE / max(height, width))
    visualizer = Visualizer(
        np.ascontiguousarray(image_bgr[:, :, ::-1]), Metadata(thing_classes=class_names), scale=scale
    )
    classes = kept.pred_classes.tolist()
    colours = colormap(rgb=True, maximum=1)
    # overlay_instances rather than draw_instance_predictions, whose colours are drawn by lot.
    visualizer.overlay_instances(
        boxes=boxes,
        masks=masks,
        labels=[f"{class_names[k]} {score:.0%}" for k, score in zip(classes, kept.scores.tolist(), strict=True)],
        assigned_colors=[colours[k % len(colours)] for k in classes],
    )
    return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])


def _shrink(
    image: np.ndarray, boxes: Boxes, masks: torch.Tensor | None
) -> tuple[np.ndarray, Boxes, torch.Tensor | None]:
    """Bring the long side down to ``_MAX_SIDE``; done before Visualizer, whose own ``scale`` still copies the whole image many times."""
    old_height, old_width = image.shape[:2]
    ratio = _MAX_SIDE / max(old_height, old_width)
    if ratio >= 1:
        return image, boxes, masks
    height, width = max(round(old_height * ratio), 1), max(round(old_width * ratio), 1)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    boxes = boxes.clone()
    boxes.scale(width / old_width, height / old_height)
    if masks is not None:
        rows = (torch.arange(height) * old_height) // height
        columns = (torch.arange(width) * old_width) // width
        masks = masks[:, rows][:, :, columns]
    return image, boxes, masks
