"""Synthetic COCO dataset: six kinds of shapes on textured backgrounds, generated on first use."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halodet.utils.io import write_json

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
NUM_IMAGES = {"train": 400, "val": 100}
VERSION = 1  # increase it when the drawing changes: datasets of an older version are then drawn again

# fmt: off
_COLORS = ((230, 80, 60), (60, 130, 230), (70, 180, 90), (240, 190, 50), (160, 90, 210), (60, 190, 200))  # RGB
_SIZES = (  # width, height
    (160, 120), (120, 160), (176, 132), (132, 176), (192, 144), (144, 192), (192, 160), (160, 160),
)
# fmt: on
_DESCRIPTION = "halodet shapes"
_SPLITS = tuple(NUM_IMAGES)
_SUPERSAMPLE = 4
_MAX_TILT = 0.45  # radians; objects are mostly upright in photos too
_MIN_VISIBLE = 0.65  # of an object's area; less is not recognizable
_EMPTY_EVERY, _CROWD_EVERY = 20, 8


@dataclass
class _Scene:
    """An image being drawn: float RGB, and per pixel the number of the visible object (0 is background)."""

    image: np.ndarray
    owner: np.ndarray
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


def _outline(kind: str, centre: np.ndarray, radius: float, angle: float) -> list[np.ndarray]:
    """Return closed contours (N, 2) in pixels."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return [centre + radius * (contour @ turn) for contour in _UNIT_OUTLINES[kind]]


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


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    first, second = (_color(rng, (0.05, 0.5), (0.3, 0.95)) for _ in range(2))
    style = rng.choice(["gradient", "clouds", "stripes", "grain"])
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
    return image.astype(np.float32)


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


def _add(rng: np.random.Generator, scene: _Scene, kind: int, radius: float, members: int = 1) -> None:
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


def _draw(rng: np.random.Generator, index: int) -> _Scene:
    width, height = _SIZES[rng.integers(len(_SIZES))]
    scene = _Scene(_background(rng, height, width), np.zeros((height, width), np.int64))
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


def _segmentation(mask: np.ndarray, crowd: bool) -> list[list[int]] | dict[str, Any]:
    """Return the COCO mask: a polygon along pixel edges, or RLE for crowds and masks with holes or several parts."""
    height, width = mask.shape
    if crowd:
        flat = mask.flatten(order="F")
        ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
        counts = np.diff(ends).tolist()
        return {"size": [height, width], "counts": [0, *counts] if flat[0] else counts}
    # OpenCV follows pixel centers; at double resolution, half of its path is exactly the edge between pixels.
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    encoded = mask_util.encode(np.asfortranarray(mask, np.uint8))
    if len(contours) == 1:
        path = (contours[0][:, 0] + 1) // 2
        path = path[(path != np.roll(path, 1, axis=0)).any(axis=1)]  # inner corners occur twice
        polygon = [path.reshape(-1).tolist()]
        if mask_util.frPyObjects(polygon, height, width)[0]["counts"] == encoded["counts"]:
            return polygon
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def _annotations(scene: _Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    annotations = []
    for number, (kind, crowd) in enumerate(zip(scene.classes, scene.crowds, strict=True)):
        mask = scene.owner == number + 1
        x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
        annotations.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": kind + 1,
                "iscrowd": int(crowd),
                "bbox": [x, y, width, height],
                "area": int(mask.sum()),
                "segmentation": _segmentation(mask, crowd),
            }
        )
    return annotations


def _is_complete(folder: Path, json_file: Path, info: dict[str, Any]) -> bool:
    """Return whether this dataset exists already.

    Raises:
        ValueError: other files exist in its place.
    """
    refusal = (
        f"was not generated by halodet and is not replaced. Fix: move it, or use another folder than {folder.parent}."
    )
    names = set(os.listdir(folder)) if folder.exists() else set()
    if any(not re.fullmatch(r"\d{6}\.png", name) for name in names):
        raise ValueError(f"{folder} {refusal}")
    if not json_file.exists():
        return False
    try:
        found = json.loads(json_file.read_bytes())["info"]
        generated = found["description"] == _DESCRIPTION
    except (ValueError, KeyError, TypeError):
        generated = False
    if not generated:
        raise ValueError(f"{json_file} {refusal}")
    return found == info and names == {f"{index:06d}.png" for index in range(info["num_images"])}


def _write(folder: Path, json_file: Path, info: dict[str, Any]) -> None:
    split, seed = info["split"], info["seed"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    work = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        (work / "new").mkdir()
        for index in tqdm(range(info["num_images"]), desc=f"generating shapes, {split}", unit="image"):
            scene = _draw(np.random.default_rng((seed, _SPLITS.index(split), index)), index)
            pixels = np.clip(np.rint(scene.image), 0, 255).astype(np.uint8)
            file_name = f"{index:06d}.png"
            (work / "new" / file_name).write_bytes(cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes())
            images.append({"id": index, "file_name": file_name, "width": pixels.shape[1], "height": pixels.shape[0]})
            annotations += _annotations(scene, index, len(annotations) + 1)
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
        dataset = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        # The json marks the dataset as complete, so the old one is deleted first and the new one is written last.
        json_file.unlink(missing_ok=True)
        if folder.exists():
            folder.rename(work / "old")
        (work / "new").rename(folder)
        write_json(json_file, dataset)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_shapes(root: str | Path, split: str, num_images: int, seed: int = 0) -> Path:
    """Generate one split: ``<root>/<split>/*.png`` and ``<root>/annotations/<split>.json``; return the json's path.

    Image ``i`` depends only on ``seed``, ``split`` and ``i``, to the byte. An existing dataset of the same arguments is
    kept; one of other arguments or an older version is replaced.

    Args:
        root: folder of the dataset, created if missing.
        split: "train" or "val".
        num_images: number of images, 120 to 192 pixels a side.
        seed: seed, 0 or more.

    Raises:
        ValueError: an argument is invalid, or the folder contains other files.
        OSError: the folder cannot be written.
    """
    if split not in _SPLITS:
        raise ValueError(f"split={split!r} is invalid: expected one of {', '.join(_SPLITS)}.")
    if not 1 <= num_images <= 1_000_000 or seed < 0:
        raise ValueError(
            f"num_images={num_images}, seed={seed} is invalid: expected 1 to 1000000 images and a seed of 0 or more."
        )
    folder, json_file = Path(root) / split, Path(root) / "annotations" / f"{split}.json"
    info = {"description": _DESCRIPTION, "version": VERSION, "split": split, "num_images": num_images, "seed": seed}
    try:
        if _is_complete(folder, json_file, info):  # before the lock, so that a read-only dataset works
            return json_file
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(json_file)):  # all ranks of a run get here at once
            if not _is_complete(folder, json_file, info):
                _write(folder, json_file, info)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot write the synthetic shapes dataset to {root} ({reason}). Fix: run in a writable folder."
        ) from error
    return json_file


def _load(root: str, split: str, name: str) -> list[dict[str, Any]]:
    json_file = write_shapes(root, split, NUM_IMAGES[split])
    return load_coco_json(str(json_file), str(Path(root) / split), name)


def register_shapes(root: str | Path = "datasets/shapes") -> None:
    """Register ``halodet_shapes_train`` and ``halodet_shapes_val``; images are generated when a split is first loaded.

    Args:
        root: folder of the dataset; another one replaces that of an earlier call.
    """
    for split in _SPLITS:
        name, json_file = f"halodet_shapes_{split}", os.path.join(root, "annotations", f"{split}.json")
        if name in DatasetCatalog:
            if MetadataCatalog.get(name).json_file == json_file:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, lambda split=split, name=name: _load(str(root), split, name))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=os.path.join(root, split),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_colors=list(_COLORS),
        )
