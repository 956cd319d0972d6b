"""Drawing of predictions on an image."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halodet.inference.detections import Detections, to_numpy
from halodet.inference.fonts import render_text

import cv2
import numpy as np

__all__ = ["draw", "draw_output"]

Color = tuple[int, int, int]
_Rectangle = tuple[int, int, int, int]

_MIN_SIDE = 320  # a shorter side is enlarged to this, so that labels are readable
_MAX_SCALE = 4.0
_MAX_SIDE = 4096  # a longer side is shrunk to this
_LABEL_MAP_SIDE = 512  # places of labels are searched in a map of this size
_FILL, _SEGMENT_FILL, _EDGE, _BACKGROUND = 0.4, 0.55, 0.6, 0.8  # opacities
_KEYPOINT_THRESHOLD = 0.05
_FAR = 2**15  # coordinates beyond are clipped: OpenCV's are integers
# Hues in degrees at equal perceived distances: there are many greens and few yellows in HSV.
_HUES = (0, 22, 40, 54, 90, 140, 172, 192, 212, 240, 272, 305, 335, 360)


def draw_output(
    image: np.ndarray,
    output: Mapping[str, Any],
    class_names: Sequence[str],
    stuff_names: Sequence[str] = (),
    *,
    threshold: float,
) -> np.ndarray:
    """Draw the output of a model for one image: segments, instances, proposals or semantic classes.

    Args:
        image: (H, W, 3) uint8 BGR image.
        output: what one of Detectron2's models, or a predictor, returns for the image.
        class_names: name of each class of things.
        stuff_names: name of each semantic class.
        threshold: minimum score of instances.

    Returns:
        (H', W', 3) uint8 BGR drawing; see :func:`draw` for its size.
    """
    if "instances" in output and "panoptic_seg" not in output:
        return draw(image, output["instances"], class_names, threshold=threshold)
    if "proposals" in output:
        found = output["proposals"]
        scores = 1 / (1 + np.exp(-to_numpy(found.objectness_logits).astype(np.float64)))
        boxes, classes = to_numpy(found.proposal_boxes.tensor), np.zeros(len(scores), np.int64)
        return draw(image, Detections(found.image_size, boxes, scores, classes), ["object"], threshold=threshold)
    if "panoptic_seg" in output:
        segments, infos = output["panoptic_seg"]
        styles = {info["id"]: _segment_style(info, class_names, stuff_names) for info in infos}
        return _draw_segments(image, to_numpy(segments), styles)
    classes = to_numpy(output["sem_seg"])
    classes = classes.argmax(0) if classes.ndim == 3 else classes
    return _draw_segments(image, classes, {k: (_color(k, muted=True), name) for k, name in enumerate(stuff_names)})


def draw(image: np.ndarray, instances: Any, class_names: Sequence[str], *, threshold: float) -> np.ndarray:
    """Draw boxes, masks, keypoints and labels on an image.

    Each class has a fixed color; objects with a track have that of the track, and its number in their label.

    Args:
        image: (H, W, 3) uint8 BGR image.
        instances: predictions in pixels of the image, a :class:`~halodet.inference.Detections` or Detectron2's
            ``Instances``.
        class_names: name of each class.
        threshold: minimum score.

    Returns:
        (H', W', 3) uint8 BGR drawing: of the image's size, but enlarged up to four times if its short side is below 320
        pixels, and shrunk if its long side is above 4096.
    """
    found = instances if isinstance(instances, Detections) else Detections.from_instances(instances)
    selected = np.flatnonzero(found.scores >= threshold)
    canvas = _resized(image)
    scale = np.array([canvas.shape[1] / image.shape[1], canvas.shape[0] / image.shape[0]], np.float64)
    boxes = np.nan_to_num(found.boxes[selected].astype(np.float64) * np.tile(scale, 2))
    boxes = np.rint(np.clip(boxes, -_FAR, _FAR)).astype(int)
    # The largest first, so that they do not hide the others.
    order = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable").tolist()
    classes = found.classes[selected].tolist()
    tracks = [-1] * len(selected) if found.track_ids is None else found.track_ids[selected].tolist()
    colors = [_color(k if track < 0 else track) for k, track in zip(classes, tracks, strict=True)]
    line = max(1, round(_side(canvas) / 350))
    if found.masks is not None:
        for k in order:
            _draw_mask(canvas, found.masks[selected[k]], colors[k], max(1, line - 1))
    for k in order:
        x0, y0, x1, y1 = boxes[k].tolist()
        cv2.rectangle(canvas, (x0, y0), (max(x1 - 1, x0), max(y1 - 1, y0)), colors[k], line)
    if found.keypoints is not None:
        for points in found.keypoints[selected]:
            _draw_keypoints(canvas, points, scale, line)
    scores = found.scores[selected].tolist()
    texts = [
        f"{_name(class_names, k)} {'' if track < 0 else f'#{track} '}{score:.0%}"
        for k, score, track in zip(classes, scores, tracks, strict=True)
    ]
    best_first = sorted(range(len(scores)), key=lambda k: -scores[k])
    _draw_labels(canvas, [_Label(texts[k], colors[k], boxes[k].tolist()) for k in best_first])
    return canvas


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, color: Color, line: int) -> None:
    """Fill a mask of the size of the original image, and draw its contours."""
    mask = _fit(mask, canvas.shape[:2])
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    x0, y0 = int(columns[0]), int(rows[0])
    crop = np.ascontiguousarray(mask[y0 : rows[-1] + 1, x0 : columns[-1] + 1])
    region = canvas[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]]
    cv2.copyTo(_blend(region, np.full_like(region, color), _FILL), crop, region)
    contours, _ = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0))
    cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA)


def _draw_keypoints(canvas: np.ndarray, points: np.ndarray, scale: np.ndarray, line: int) -> None:
    for x, y, score in points.tolist():
        if score > _KEYPOINT_THRESHOLD:
            center = (int(min(max(x * scale[0], -_FAR), _FAR)), int(min(max(y * scale[1], -_FAR), _FAR)))
            cv2.circle(canvas, center, 2 * line + 1, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(canvas, center, 2 * line, (0, 0, 255), -1, cv2.LINE_AA)


def _draw_segments(image: np.ndarray, segments: np.ndarray, styles: Mapping[int, tuple[Color, str]]) -> np.ndarray:
    """Fill the segments, (H, W) ids of which ``styles`` has the color and label of those to draw."""
    canvas = _resized(image)
    ids = np.array(sorted(styles), np.int64)
    # Index of the segment of each pixel, 0 for those not drawn.
    index = np.searchsorted(ids, segments)
    index = np.where(ids[np.minimum(index, len(ids) - 1)] == segments, index + 1, 0) if len(ids) else index * 0
    index = _nearest(index.astype(np.int32), canvas.shape[:2])
    colors = np.array([(0, 0, 0), *(styles[k][0] for k in ids.tolist())], np.uint8)
    drawn = (index > 0).astype(np.uint8)
    cv2.copyTo(_blend(canvas, colors[index], _SEGMENT_FILL), drawn, canvas)
    edges: Any = np.zeros(index.shape, np.uint8)
    edges[:, 1:] |= index[:, 1:] != index[:, :-1]
    edges[1:] |= index[1:] != index[:-1]
    line = max(1, round(_side(canvas) / 500))
    edges = cv2.dilate(edges, np.ones((line, line), np.uint8)) if line > 1 else edges
    cv2.copyTo(_blend(canvas, np.full_like(canvas, 255), _EDGE), edges, canvas)
    ratio = max(1.0, max(index.shape) / _LABEL_MAP_SIDE)
    small = _nearest(index, (max(round(index.shape[0] / ratio), 1), max(round(index.shape[1] / ratio), 1)))
    labels = []
    areas = np.bincount(small.ravel(), minlength=len(colors))
    for k in sorted(np.flatnonzero(areas[1:]).tolist(), key=lambda k: -areas[k + 1]):
        # The pixel with the largest distance to the border of the segment; borders of the image count.
        inside = np.pad((small == k + 1).astype(np.uint8), 1)
        y, x = np.unravel_index(cv2.distanceTransform(inside, cv2.DIST_L2, 3).argmax(), inside.shape)
        color, text = styles[int(ids[k])]
        point = [round((float(value) - 0.5) * ratio) for value in (x, y)]
        labels.append(_Label(text, color, [*point, *point], is_centered=True))
    _draw_labels(canvas, labels)
    return canvas


def _segment_style(info: Mapping[str, Any], class_names: Sequence[str], stuff: Sequence[str]) -> tuple[Color, str]:
    k = info["category_id"]
    if not info["isthing"]:
        return _color(k, muted=True), _name(stuff, k)
    track = info.get("track_id", -1)
    number = f" #{track}" if track >= 0 else ""
    score = f" {info['score']:.0%}" if "score" in info else ""
    return _color(k if track < 0 else track), _name(class_names, k) + number + score


@dataclass
class _Label:
    """Text that belongs to a box (x0, y0, x1, y1), or to a point with ``box`` (x, y, x, y) and ``is_centered``."""

    text: str
    color: Color
    box: Sequence[int]
    is_centered: bool = False


def _draw_labels(canvas: np.ndarray, labels: Sequence[_Label]) -> None:
    """Draw labels where they cover no label before them; where there is no room, the first ones cover the others."""
    normal = max(12, round(_side(canvas) / 46))
    taken: list[_Rectangle] = []
    placed = []
    for label in labels:
        x0, y0, x1, y1 = label.box
        is_small = not label.is_centered and (y1 - y0) * (x1 - x0) < (5 * normal) ** 2
        size = max(10, round(normal * 0.8)) if is_small else normal
        opacity = render_text(label.text, size)
        pad = max(2, size // 5)
        height, width = opacity.shape[0] + pad // 2 * 2 - 2, opacity.shape[1] + 2 * pad
        if label.is_centered:
            places = [(x0 - width // 2, y0 - height // 2 + shift * height) for shift in (0, 1, -1, 2, -2)]
        else:
            inside, above, below, right = (x0, y0), (x0, y0 - height), (x0, y1), (x1, y0)
            ends = [(x1 - width, y0 - height), (x0 - width, y0), (x1 - width, y1), (x1, y1 - height)]
            places = [above, below, right, *ends] if y1 - y0 < 3 * height or x1 - x0 < width // 2 else []
            places = places or [inside, above, (x0, y1 - height), (x1 - width, y0), below, right, *ends]
        room_x, room_y = max(canvas.shape[1] - width, 0), max(canvas.shape[0] - height, 0)
        clamped = [(min(max(x, 0), room_x), min(max(y, 0), room_y)) for x, y in places]
        near = [new for new, old in zip(clamped, places, strict=True) if abs(new[1] - old[1]) <= height // 2]
        free = (place for place in near if not any(_overlap(place, (width, height), other) for other in taken))
        x, y = next(free, clamped[0])
        taken.append((x, y, x + width, y + height))
        placed.append((label.color, opacity, pad))
    for (x0, y0, x1, y1), (color, opacity, pad) in reversed(list(zip(taken, placed, strict=True))):
        region = canvas[y0:y1, x0:x1]  # smaller than the label on a tiny image
        region[:] = _blend(region, np.full_like(region, color), _BACKGROUND)
        top = (y1 - y0 - opacity.shape[0]) // 2
        opacity = opacity[max(-top, 0) : max(region.shape[0] - top, 0), : max(region.shape[1] - pad, 0)]
        region = region[max(top, 0) :, pad:][: opacity.shape[0], : opacity.shape[1]]
        blue, green, red = color
        ink = 0 if 0.114 * blue + 0.587 * green + 0.299 * red > 150 else 255
        weight = opacity[:, :, None].astype(np.float32) / 255
        region[:] = np.rint(region * (1 - weight) + ink * weight)


def _overlap(place: tuple[int, int], size: tuple[int, int], other: _Rectangle) -> bool:
    width = min(place[0] + size[0], other[2]) - max(place[0], other[0])
    height = min(place[1] + size[1], other[3]) - max(place[1], other[1])
    return width > 0 and height > 0


@functools.cache
def _color(index: int, muted: bool = False) -> Color:
    """Return the color of a class, BGR: consecutive classes have distant hues."""
    position = (0.02 + index * 0.618034 + 0.13 * muted) % 1.0 * (len(_HUES) - 1)
    hue = float(np.interp(position, range(len(_HUES)), _HUES)) / 360
    saturation, value = ((0.85, 0.95), (0.65, 1.0), (0.95, 0.75))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation * (0.6 if muted else 1.0), value * (0.85 if muted else 1.0))
    return round(blue * 255), round(green * 255), round(red * 255)


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _resized(image: np.ndarray) -> np.ndarray:
    """Return a copy of the image at the size of the drawing."""
    height, width = image.shape[:2]
    scale = min(max(_MIN_SIDE / min(height, width), 1.0), _MAX_SCALE, _MAX_SIDE / max(height, width))
    image = np.ascontiguousarray(image)
    if scale == 1:
        return image.copy()
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)


def _fit(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask, as 0 and 1; where it is enlarged, its outline is smooth."""
    mask = np.ascontiguousarray(mask != 0).view(np.uint8)
    if mask.shape == size or size[0] < mask.shape[0]:
        return _nearest(mask, size)
    return (cv2.resize(mask * 255, (size[1], size[0]), interpolation=cv2.INTER_LINEAR) > 127).view(np.uint8)


def _nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an array to a height and width; each new pixel shows one of the old ones."""
    if values.shape == size:
        return values
    rows, columns = (np.arange(new) * old // new for old, new in zip(values.shape, size, strict=True))
    return values[rows][:, columns]


def _blend(image: np.ndarray, color: np.ndarray, opacity: float) -> np.ndarray:
    return cv2.addWeighted(image, 1 - opacity, color, opacity, 0)


def _side(canvas: np.ndarray) -> float:
    return float(np.sqrt(canvas.shape[0] * canvas.shape[1]))
