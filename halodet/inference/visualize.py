"""Drawing of detections on an image."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

__all__ = ["draw"]

_MIN_SIDE = 320  # a shorter side is enlarged to this, so that labels are readable
_MAX_SCALE = 4.0
_MAX_SIDE = 4096  # a longer side is shrunk to this: matplotlib needs about 150 bytes per pixel


def draw(image: np.ndarray, instances: Instances, class_names: list[str], *, threshold: float) -> np.ndarray:
    """Draw boxes, masks and labels on an image; each class has a fixed color.

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
    image, boxes, masks = _shrink(image, boxes, masks)
    height, width = image.shape[:2]
    scale = min(max(_MIN_SIDE / min(height, width), 1.0), _MAX_SCALE, _MAX_SIDE / max(height, width))
    visualizer = Visualizer(np.ascontiguousarray(image[:, :, ::-1]), Metadata(thing_classes=class_names), scale=scale)
    classes = kept.pred_classes.tolist()
    colors = colormap(rgb=True, maximum=1)
    # draw_instance_predictions would choose random colors.
    visualizer.overlay_instances(
        boxes=boxes,
        masks=masks,
        labels=[f"{class_names[k]} {score:.0%}" for k, score in zip(classes, kept.scores.tolist(), strict=True)],
        assigned_colors=[colors[k % len(colors)] for k in classes],
    )
    return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])


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
        rows = (torch.arange(height) * old_height) // height
        columns = (torch.arange(width) * old_width) // width
        masks = masks[:, rows][:, :, columns]
    return image, boxes, masks
