"""Random scenes of simple shapes on textured backgrounds, with the mask of each object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
BACKGROUNDS = ("gradient", "clouds", "stripes", "grain")

# fmt: off
_SIZES = (  # width, height
    (160, 120), (120, 160), (176, 132), (132, 176), (192, 144), (144, 192), (192, 160), (160, 160),
)
# fmt: on
_SUPERSAMPLE = 4
_MAX_TILT = 0.45  # radians; objects are mostly upright in photos too
_MIN_VISIBLE = 0.65  # of an object's area; less is not recognizable
_EMPTY_EVERY, _CROWD_EVERY = 20, 8


@dataclass
class Scene:
    """An image being drawn: float RGB, per pixel the number of the visible object (0: background), and the texture."""

    image: np.ndarray
    owner: np.ndarray
    background: str
    classes: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)


def _spokes(radii: list[float]) -> np.ndarray:
    """Return a contour (N, 2) of points at these distances from the center, at equal angles from the top on."""
    turn = np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.array(radii)[:, None] * np.stack([np.sin(turn), -np.cos(turn)], axis=1)


_CROSS = [(3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1)]
_UNIT_OUTLINES = {  # radius 1; a second contour is a hole
    "circle": [_spokes([1.0] * 48)],
    "square": [np.array([(1, -1), (1, 1), (-1, 1), (-1, -1)]) / math.sqrt(2)],
    "triangle": [_spokes([1.0] * 3)],
    "star": [_spokes([1.0, 0.42] * 5)],
    "ring": [_spokes([1.0] * 48), _spokes([0.52] * 48)],
    "cross": [np.array(_CROSS) / math.sqrt(10)],
}


def _outline(kind: str, center: np.ndarray, radius: float, angle: float) -> list[np.ndarray]:
    """Return closed contours (N, 2) in pixels."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return [center + radius * (contour @ turn) for contour in _UNIT_OUTLINES[kind]]


def _area(contours: list[np.ndarray]) -> float:
    whole, *holes = (cv2.contourArea(contour.astype(np.float32)) for contour in contours)
    return whole - sum(holes)


def _coverage(contours: list[np.ndarray], height: int, width: int, line: float = 0.0) -> np.ndarray:
    """Return how much of each pixel the shape covers, or its outline of ``line`` pixels, from 0 to 255."""
    canvas = np.zeros((height * _SUPERSAMPLE, width * _SUPERSAMPLE), np.uint8)
    points = [np.rint((contour * _SUPERSAMPLE - 0.5) * 16).astype(np.int32) for contour in contours]
    if line:
        cv2.polylines(canvas, points, True, 255, max(1, round(line * _SUPERSAMPLE)), shift=4)
    else:
        cv2.fillPoly(canvas, points, 255, shift=4)  # even-odd rule: a second contour is a hole
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def _color(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a plane that increases from 0 to 1 across the image in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:height, 0:width]
    plane = math.cos(angle) * columns + math.sin(angle) * rows
    return (plane - plane.min()) / np.ptp(plane)


def _background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, str]:
    first, second = (_color(rng, (0.05, 0.5), (0.3, 0.95)) for _ in range(2))
    style = str(rng.choice(BACKGROUNDS))
    if style == "clouds":
        grid = rng.uniform(0, 1, (rng.integers(4, 9), rng.integers(4, 9))).astype(np.float32)
        mix = np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    elif style == "stripes":
        mix = 0.5 + 0.5 * np.tanh(3 * np.sin(_ramp(rng, height, width) * 2 * math.pi * rng.integers(4, 12)))
        second = 0.65 * first + 0.35 * second  # full contrast would hide the objects
    else:
        mix = _ramp(rng, height, width)
    image = first + (second - first) * mix[:, :, None]
    if style == "grain":
        image = image + rng.normal(0, 14, (height, width, 1))
    return image.astype(np.float32), style


def _paint(rng: np.random.Generator, image: np.ndarray, contours: list[np.ndarray], radius: float) -> None:
    height, width = image.shape[:2]
    cover = _coverage(contours, height, width)
    behind = image[cover >= 128].mean(axis=0)
    choices = [_color(rng, (0.35, 1.0), (0.35, 1.0)) for _ in range(6)]
    # Take the first color that differs enough from the background, else the most different one.
    distances = [float(np.linalg.norm(color - behind)) for color in choices]
    color = choices[next((i for i, distance in enumerate(distances) if distance > 90), int(np.argmax(distances)))]
    shade = 0.75 + 0.45 * _ramp(rng, height, width)
    alpha = cover[:, :, None] / np.float32(255)
    image += alpha * (color * shade[:, :, None] - image)
    edge = _coverage(contours, height, width, line=float(np.clip(0.12 * radius, 0.6, 3.0)))
    image += alpha * (edge[:, :, None] / np.float32(255)) * (color * rng.uniform(0.3, 0.6) - image)


def _add(rng: np.random.Generator, scene: Scene, kind: int, radius: float, members: int = 1) -> None:
    """Draw one object, or a crowd of ``members``, at a random place where all objects stay visible, if one is found."""
    height, width = scene.owner.shape
    for _ in range(12):
        middle = rng.uniform((0.06 * width, 0.06 * height), (0.94 * width, 0.94 * height))
        spread = 1.4 * radius * math.sqrt(members) if members > 1 else 0.0
        parts, mask, area = [], np.zeros((height, width), bool), 0.0
        for _ in range(members):
            size = radius * rng.uniform(0.85, 1.2) if members > 1 else radius
            contours = _outline(
                CLASSES[kind], middle + rng.uniform(-spread, spread, 2), size, rng.uniform(-_MAX_TILT, _MAX_TILT)
            )
            cover = _coverage(contours, height, width) >= 128
            if members > 1 and (not cover.any() or (cover & mask).any()):
                continue  # the members of a crowd do not overlap
            parts.append(contours)
            mask |= cover
            area += _area(contours)
        left = np.bincount(scene.owner[~mask], minlength=len(scene.areas) + 1)[1:]
        shown = mask.sum() >= max(1, 0.6 * area) and len(parts) > members // 2
        if shown and all(pixels >= _MIN_VISIBLE * whole for pixels, whole in zip(left, scene.areas, strict=True)):
            for contours in parts:
                _paint(rng, scene.image, contours, radius)
            scene.classes.append(kind)
            scene.crowds.append(members > 1)
            scene.areas.append(area)
            scene.owner[mask] = len(scene.areas)
            return


def draw_scene(rng: np.random.Generator, index: int) -> Scene:
    """Draw a scene; ``index`` decides whether it is empty or contains a crowd."""
    width, height = _SIZES[rng.integers(len(_SIZES))]
    image, style = _background(rng, height, width)
    scene = Scene(image, np.zeros((height, width), np.int64), style)
    if index % _EMPTY_EVERY == 3:
        return scene
    short = min(width, height)
    radii = np.exp(rng.uniform(math.log(10), math.log(0.36 * short), rng.integers(2, 7)))
    if rng.random() < 0.2:  # COCO's "large" starts at an area of 96 x 96 pixels
        radii[0] = rng.uniform(0.45, 0.62) * short
    for radius in sorted(radii, reverse=True):  # small objects last, or they would mostly be hidden
        _add(rng, scene, int(rng.integers(len(CLASSES))), float(radius))
    if index % _CROWD_EVERY == 5:
        _add(rng, scene, int(rng.integers(len(CLASSES))), rng.uniform(3.5, 5.0), members=int(rng.integers(12, 20)))
    return scene
