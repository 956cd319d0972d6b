"""Detections of one image as numpy arrays, and their conversion to COCO results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Detections", "encode_mask", "to_coco", "to_numpy"]


@dataclass
class Detections:
    """Detected objects of one image.

    Indexing with a mask, slice, integer array or integer returns the selected objects.

    Attributes:
        image_size: height and width of the image in pixels.
        boxes: (N, 4) x1, y1, x2, y2 in pixels.
        scores: (N,) scores.
        classes: (N,) index of the class.
        masks: (N, H, W) bool; None without masks.
        keypoints: (N, K, 3) x, y and score; None without keypoints.
        track_ids: (N,) number of the track of each object in a video, -1 for none; None without tracking.
    """

    image_size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    track_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("boxes", "classes", "masks", "keypoints", "track_ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.scores):
                raise ValueError(f"{name} has {len(values)} rows: expected {len(self.scores)}, the number of scores.")

    @classmethod
    def from_instances(cls, instances: Any) -> Detections:
        """Convert Detectron2's ``Instances``; tensors on the CPU share their memory with the result."""
        masks = instances.pred_masks if instances.has("pred_masks") else None
        keypoints = instances.pred_keypoints if instances.has("pred_keypoints") else None
        height, width = instances.image_size
        return cls(
            (int(height), int(width)),
            to_numpy(instances.pred_boxes.tensor),
            to_numpy(instances.scores),
            to_numpy(instances.pred_classes),
            None if masks is None else to_numpy(getattr(masks, "tensor", masks)),
            None if keypoints is None else to_numpy(keypoints),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, item: Any) -> Detections:
        if isinstance(item, int | np.integer):
            if not -len(self) <= item < len(self):
                raise IndexError(f"index {item} is out of range for {len(self)} detections")
            item = slice(int(item), int(item) + 1 or None)
        elif not isinstance(item, slice):
            item = to_numpy(item)
            item = (
                item if item.size or item.dtype == bool else item.astype(np.int64)
            )  # numpy makes [] an array of floats
        return Detections(
            self.image_size,
            self.boxes[item],
            self.scores[item],
            self.classes[item],
            None if self.masks is None else self.masks[item],
            None if self.keypoints is None else self.keypoints[item],
            None if self.track_ids is None else self.track_ids[item],
        )


def to_numpy(values: Any) -> np.ndarray:
    """Return an array, or a tensor on any device, as an array."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    values = values.detach().cpu()
    try:
        return values.numpy()
    except TypeError:  # numpy has no bfloat16
        return values.float().numpy()


def to_coco(detections: Any, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Convert the predictions of one image to COCO results.

    Args:
        detections: a :class:`Detections`, or Detectron2's ``Instances``.
        image_id: id of the image.
        category_ids: dataset id of each class of the model.

    Returns:
        Dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels), ``score``, ``segmentation``
        (RLE) where there are masks, ``keypoints`` (x, y in pixel indices, score) where there are keypoints, and
        ``track_id`` where there is a track.

    Source: Detectron2's ``instances_to_coco_json``.
    """
    if not isinstance(detections, Detections):
        detections = Detections.from_instances(detections)
    boxes = detections.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    keypoints = detections.keypoints
    if keypoints is not None:
        keypoints = keypoints.copy()
        keypoints[:, :, :2] -= 0.5  # from coordinates to the indices of pixels
    results = []
    for k, (box, score) in enumerate(zip(boxes.tolist(), detections.scores.tolist(), strict=True)):
        category_id = category_ids[int(detections.classes[k])]
        result = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        if detections.masks is not None:
            result["segmentation"] = encode_mask(detections.masks[k])
        if keypoints is not None:
            result["keypoints"] = keypoints[k].ravel().tolist()
        if detections.track_ids is not None and detections.track_ids[k] >= 0:
            result["track_id"] = int(detections.track_ids[k])
        results.append(result)
    return results


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode an (H, W) mask as COCO's compressed RLE, ``{"size": [H, W], "counts": text}``.

    Source: ``rleEncode`` and ``rleToString`` of pycocotools.
    """
    pixels = np.asarray(mask, dtype=bool).ravel(order="F")
    starts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    first = [0] if pixels.size and pixels[0] else []  # counts start with that of the background
    counts: np.ndarray = np.diff(np.concatenate([[0], first, starts, [pixels.size]]).astype(np.int64))
    counts[3:] -= counts[1:-2].copy()
    # Groups of five bits, the lowest first; bit 5 is set in all but the last group of a number.
    letters, used = np.zeros((len(counts), 13), np.uint8), np.zeros((len(counts), 13), bool)
    rest, active = counts, np.ones(len(counts), bool)
    for group in range(letters.shape[1]):
        bits, rest = rest & 0x1F, rest >> 5
        more = np.where(bits & 0x10, rest != -1, rest != 0)
        letters[:, group], used[:, group] = (bits | (more << 5)) + 48, active
        active = active & more
        if not active.any():
            break
    height, width = mask.shape
    return {"size": [int(height), int(width)], "counts": letters[used].tobytes().decode("ascii")}
