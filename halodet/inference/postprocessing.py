"""Detectron2's processing of images and outputs around a model, in numpy and OpenCV."""

from __future__ import annotations

from typing import Any

from halodet.inference.detections import Detections

import cv2
import numpy as np
from PIL import Image

__all__ = ["combine_panoptic", "label_map", "paste_masks", "resize_shortest_edge", "resized_size", "scale_boxes"]


def resize_shortest_edge(image: np.ndarray, min_size: int, max_size: int) -> np.ndarray:
    """Resize a uint8 image so that its shorter side is ``min_size``, but its longer side at most ``max_size``.

    A side is at least 1 pixel; a ``min_size`` of 0 leaves the image as it is.

    Source: Detectron2's ``ResizeShortestEdge``; the result is equal bit for bit.
    """
    if min_size == 0:
        return image
    height, width = resized_size(image.shape[0], image.shape[1], min_size, max_size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return the height and width to which :func:`resize_shortest_edge` resizes an image."""
    if min_size == 0:
        return height, width
    size = min_size * 1.0
    scale = size / min(height, width)
    new_height, new_width = (size, scale * width) if height < width else (scale * height, size)
    if max(new_height, new_width) > max_size:
        scale = max_size * 1.0 / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def scale_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scale (N, 4) float32 boxes from an image of size ``old``, (height, width), to one of size ``new``, and clip them.

    Returns:
        The boxes, and which of them are finite and not empty.

    Source: Detectron2's ``detector_postprocess``.
    """
    (height, width), finite = new, np.isfinite(boxes).all(axis=1)
    boxes = np.where(finite[:, None], boxes, 0)
    boxes[:, 0::2] = np.clip(boxes[:, 0::2] * (width / old[1]), 0, width)
    boxes[:, 1::2] = np.clip(boxes[:, 1::2] * (height / old[0]), 0, height)
    return boxes, finite & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float = 0.5) -> np.ndarray:
    """Paste masks of objects into an image: sample them bilinearly at the centers of the pixels.

    Args:
        masks: (N, M, M) float32 probabilities, each of which covers its box.
        boxes: (N, 4) float32 boxes in pixels.
        size: height and width of the image.
        threshold: minimum probability.

    Returns:
        (N, height, width) bool.

    Source: Detectron2's ``paste_masks_in_image``. A result differs where a probability equals the threshold up to
    float32 rounding.
    """
    height, width = size
    pasted = np.zeros((len(masks), height, width), bool)
    masks = masks.astype(np.float32, copy=False)
    for mask, box, result in zip(masks, boxes.astype(np.float32, copy=False), pasted, strict=True):
        rows, row_weights = _sampling(box[1], box[3], height, mask.shape[0])
        columns, column_weights = _sampling(box[0], box[2], width, mask.shape[1])
        result[rows, columns] = (row_weights @ mask) @ column_weights.T >= threshold
    return pasted


def _sampling(start: np.float32, end: np.float32, pixels: int, cells: int) -> tuple[slice, np.ndarray]:
    """Return the pixels around a box along one axis, and the (pixels, cells) weights of the cells of its mask.

    Cells outside of the mask are zero. Locations are computed in float32 in the order of Detectron2's operations.
    """
    first, last = max(int(np.floor(start)) - 1, 0), min(int(np.ceil(end)) + 1, pixels)
    centers = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        location = (centers - start) / (end - start) * np.float32(2) - np.float32(1)
        location = location * np.float32(cells / 2) + np.float32((cells - 1) / 2)  # as torch's grid_sample
    location = np.clip(np.nan_to_num(location, nan=-2.0), -2, cells + 1)
    low = np.floor(location)
    fraction, low = location - low, low.astype(np.int64)
    weights = np.zeros((len(centers), cells), np.float32)
    for cell, weight in ((low, 1 - fraction), (low + 1, fraction)):
        inside = np.flatnonzero((cell >= 0) & (cell < cells))
        weights[inside, cell[inside]] = weight[inside]
    return slice(first, max(first, last)), weights


def label_map(logits: np.ndarray, stride: int, resized: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return the semantic class of each pixel of an image, of which only two maps are held at a time.

    Args:
        logits: (C, h, w) logits at a stride of the padded input.
        stride: input pixels per pixel of the logits.
        resized: height and width of the resized image, without padding.
        size: height and width of the image.

    Returns:
        (height, width) int32 index of the class with the largest logit.

    Source: Detectron2's ``SemSegFPNHead`` and ``sem_seg_postprocess``.
    """
    best, labels = np.full(size, -np.inf, np.float32), np.zeros(size, np.int32)
    for index, plane in enumerate(logits.astype(np.float32, copy=False)):
        plane = _resize(plane, (plane.shape[0] * stride, plane.shape[1] * stride))
        plane = _resize(plane[: resized[0], : resized[1]], size)
        better = plane > best
        labels[better] = index
        np.maximum(best, plane, out=best)
    return labels


def _resize(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize bilinearly as ``torch.nn.functional.interpolate`` with ``align_corners=False``."""
    if plane.shape == size:
        return plane
    return cv2.resize(np.ascontiguousarray(plane), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def combine_panoptic(
    detections: Detections,
    labels: np.ndarray,
    *,
    overlap_threshold: float,
    stuff_area_limit: float,
    instances_confidence_threshold: float,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Combine detections with masks and semantic classes to panoptic segments.

    Args:
        detections: detected objects.
        labels: (H, W) index of the semantic class; 0 stands for all things.
        overlap_threshold: maximum share of an object that objects with a higher score cover.
        stuff_area_limit: minimum area of a segment of stuff in pixels.
        instances_confidence_threshold: minimum score of an object.

    Returns:
        (H, W) int32 id of the segment, 0 for none, and a description of each segment.

    Source: Detectron2's ``combine_semantic_and_instance_outputs``.
    """
    segments = np.zeros(labels.shape, np.int32)
    infos: list[dict[str, Any]] = []
    for index in np.argsort(-detections.scores, kind="stable").tolist():
        score = float(detections.scores[index])
        if score < instances_confidence_threshold or detections.masks is None:
            break
        mask = detections.masks[index]
        area = int(np.count_nonzero(mask))
        covered = int(np.count_nonzero(mask & (segments > 0)))
        if area == 0 or covered / area > overlap_threshold:
            continue
        segments[mask & (segments == 0)] = len(infos) + 1
        category_id = int(detections.classes[index])
        infos.append(
            {
                "id": len(infos) + 1,
                "isthing": True,
                "score": score,
                "category_id": category_id,
                "instance_id": index,
            }
        )
    rest = np.where(segments == 0, labels, 0)
    present = np.bincount(labels.ravel())
    areas = np.bincount(rest.ravel(), minlength=len(present)).tolist()
    for label in np.flatnonzero(present).tolist():
        area = areas[label]
        if label == 0 or area < stuff_area_limit:
            continue
        segments[rest == label] = len(infos) + 1
        infos.append({"id": len(infos) + 1, "isthing": False, "category_id": label, "area": area})
    return segments, infos
