"""Comparison of an exported detector with its model on images of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from halodet.inference.base_predictor import BasePredictor
from halodet.inference.detections import Detections

import cv2
import numpy as np

SIZES = ((480, 640), (640, 480), (500, 500), (360, 640), (333, 517))  # of the compared images, height and width
_MIN_SIDE = 1.0  # pixels; a detector whose boxes are smaller finds nothing that could differ


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of each kind at which an exported file agrees with its model.

    Args:
        score: of scores.
        box: of box coordinates in pixels of the image.
        mask: pixels of a mask that differ, relative to the union of both masks.
        mean_mask: the same, on average over the detections.
        unmatched: share of detections without a partner.
        pixels: share of the pixels with another segment.
        margin: detections with scores up to this above the score threshold may lack a partner, because rounding moves
            them across it.
    """

    score: float
    box: float
    mask: float
    mean_mask: float
    unmatched: float
    pixels: float
    margin: float

    def __str__(self) -> str:
        masks = f"masks {self.mask:.0%} and {self.mean_mask:.0%} on average"
        limits = f"scores {self.score}, boxes {self.box} px, {masks}, segments {self.pixels:.1%}"
        return f"{limits}, without a partner {self.unmatched:.0%}"


TOLERANCES = {
    "float32": Tolerance(score=1e-3, box=0.1, mask=0.02, mean_mask=0.02, unmatched=0.0, pixels=1e-3, margin=2e-3),
    "float16": Tolerance(score=0.02, box=2.0, mask=0.1, mean_mask=0.05, unmatched=0.05, pixels=0.02, margin=0.04),
    # Rounding to 8 bits moves boxes and scores, so what is found counts: class, an overlap of one half, mean mask.
    "int8": Tolerance(score=1.0, box=float("inf"), mask=1.0, mean_mask=0.5, unmatched=0.1, pixels=0.2, margin=0.1),
}


@dataclass(frozen=True)
class Comparison:
    """Detections of a model and of its exported file in one image.

    Args:
        size: height and width of the image.
        expected: number of detections of the model.
        found: number of detections of the file.
        matched: number of pairs: equal class, overlapping boxes.
        unmatched: detections without a partner, of the model or of the file, whichever are more; those at the score
            threshold do not count.
        score: greatest difference of scores in a pair.
        box: greatest difference of box coordinates in a pair, in pixels.
        mask: greatest share of differing pixels of a pair's masks; None without masks.
        mean_mask: its mean over the pairs.
        pixels: share of pixels with another class or segment; None without segmentation.
        usable: whether the model found a box with sides of more than a pixel.
    """

    size: tuple[int, int]
    expected: int
    found: int
    matched: int
    unmatched: int
    score: float
    box: float
    mask: float | None
    mean_mask: float | None
    pixels: float | None
    usable: bool

    def agrees(self, tolerance: Tolerance) -> bool:
        """Return whether all differences are within the tolerance."""
        return (
            self.unmatched <= tolerance.unmatched * max(self.expected, self.found)
            and self.score <= tolerance.score
            and self.box <= tolerance.box
            and (self.mask or 0.0) <= tolerance.mask
            and (self.mean_mask or 0.0) <= tolerance.mean_mask
            and (self.pixels or 0.0) <= tolerance.pixels
        )


def compare_detectors(
    model: BasePredictor,
    exported: BasePredictor,
    images: Sequence[np.ndarray],
    *,
    threshold: float,
    limit: int,
    margin: float,
) -> Iterator[Comparison]:
    """Compare a model with its exported file in images.

    Args:
        model: the model.
        exported: the file.
        images: (H, W, 3) uint8 BGR images; they are resized to :data:`SIZES`.
        threshold: score threshold of the model.
        limit: maximum number of detections in an image.
        margin: see :class:`Tolerance`.

    Yields:
        the comparison in each image.
    """
    for number, (height, width) in enumerate(SIZES):
        image = cv2.resize(images[number % len(images)], (width, height), interpolation=cv2.INTER_LINEAR)
        outputs = model.predict(image), exported.predict(image)
        yield compare_outputs(*outputs, (height, width), threshold=threshold, limit=limit, margin=margin)


def compare_outputs(
    expected: dict[str, Any],
    found: dict[str, Any],
    size: tuple[int, int],
    *,
    threshold: float = 0.0,
    limit: int = 100,
    margin: float = 0.0,
) -> Comparison:
    """Compare the outputs of two predictors for an image of this size; see :func:`compare_detectors`."""
    a, b = _detections(expected["instances"]), _detections(found["instances"])
    pairs = match(a, b)
    i, j = [p[0] for p in pairs], [p[1] for p in pairs]
    unmatched = max(_count_alone(a, i, b, threshold, limit, margin), _count_alone(b, j, a, threshold, limit, margin))
    mask = mean_mask = None
    if a.masks is not None and b.masks is not None:
        differences = [_mask_difference(a.masks[m], b.masks[n]) for m, n in pairs] or [0.0]
        mask, mean_mask = max(differences), float(np.mean(differences))
    pixels = None
    if "panoptic_seg" in expected:
        pixels = float((_categories(*expected["panoptic_seg"]) != _categories(*found["panoptic_seg"])).mean())
    return Comparison(
        size=size,
        expected=len(a),
        found=len(b),
        matched=len(pairs),
        unmatched=unmatched,
        score=float(np.abs(a.scores[i] - b.scores[j]).max(initial=0.0)),
        box=float(np.abs(a.boxes[i] - b.boxes[j]).max(initial=0.0)),
        mask=mask,
        mean_mask=mean_mask,
        pixels=pixels,
        usable=bool(len(a) and (np.minimum(*(a.boxes[:, 2:] - a.boxes[:, :2]).T) > _MIN_SIDE).any()),
    )


def _count_alone(
    given: Detections, matched: Sequence[int], other: Detections, threshold: float, limit: int, margin: float
) -> int:
    """Count the detections without a partner among the others, but those that rounding may have removed there."""
    # Below the threshold, or after the last one that fits.
    low = threshold if len(other) < limit else max(threshold, float(other.scores.min()))
    alone = np.setdiff1d(np.arange(len(given)), matched)
    return int((given.scores[alone] >= low + margin).sum())


def match(a: Detections, b: Detections, least: float = 0.5) -> list[tuple[int, int]]:
    """Return pairs of detections of equal class by decreasing overlap, each of at least ``least``."""
    overlaps = box_iou(a.boxes, b.boxes) * (a.classes[:, None] == b.classes)
    # Of pairs that overlap equally well, that with the closest scores: several boxes may coincide.
    closeness = np.abs(a.scores[:, None] - b.scores)
    order = np.lexsort((closeness.ravel(), -np.round(overlaps, 3).ravel()))
    pairs: list[tuple[int, int]] = []
    used: tuple[set[int], set[int]] = (set(), set())
    for index in order:
        m, n = divmod(int(index), len(b))
        if overlaps[m, n] < least:
            break
        if m not in used[0] and n not in used[1]:
            pairs.append((m, n))
            used[0].add(m)
            used[1].add(n)
    return pairs


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union (N, M) of boxes (N, 4) and (M, 4); 0 for boxes without an area."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(1) for x in (a, b)]
    union = areas[0][:, None] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _detections(instances: Any) -> Detections:
    return instances if isinstance(instances, Detections) else Detections.from_instances(instances)


def _mask_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float((a ^ b).sum() / max(int((a | b).sum()), 1))


def _categories(segments: Any, infos: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the class of each pixel: -1 for none, class of things, and -2 - class of stuff."""
    segments = np.asarray(segments)
    table = np.full(max([0, *(info["id"] for info in infos)]) + 1, -1)
    for info in infos:
        table[info["id"]] = info["category_id"] if info["isthing"] else -2 - info["category_id"]
    return table[segments]
