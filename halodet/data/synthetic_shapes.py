"""Built-in dataset of drawn scenes: six kinds of shape on textured backgrounds, in COCO format, made on first use."""

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

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from tqdm import tqdm

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = (
    (230, 80, 60),
    (60, 130, 230),
    (70, 180, 90),
    (240, 190, 50),
    (160, 90, 210),
    (60, 190, 200),
)  # RGB, for pictures only
NUM_IMAGES = {"train": 400, "val": 100}
VERSION = 1  # raise it when the drawing changes: datasets made by an older version are then drawn anew

_MAKER = "halodet shapes"
_SPLITS = tuple(NUM_IMAGES)
_SIZES = (
    (160, 120),
    (120, 160),
    (176, 132),
    (132, 176),
    (192, 144),
    (144, 192),
    (192, 160),
    (160, 160),
)  # width, height
_SUPERSAMPLE = 4
_TILT = 0.45  # radians; things mostly stand upright in photos too
_MIN_VISIBLE = 0.65  # of an object's whole area; less is no longer recognisable
_EMPTY_EVERY, _CROWD_EVERY = 20, 8


@dataclass
class _Scene:
    """A picture being painted: RGB floats, and for each pixel the number of the object seen there (0 is background)."""

    image: np.ndarray
    owner: np.ndarray
    classes: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)


def _spokes(radii: list[float]) -> np.ndarray:
    """Contour (N, 2) through points at these distances from the middle, evenly spread around it, the first straight above."""
    turn = np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.array(radii)[:, None] * np.stack([np.sin(turn), -np.cos(turn)], axis=1)


_CROSS = [(3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1)]
_UNIT_OUTLINES = {  # of radius 1; a second contour is a hole
    "circle": [_spokes([1.0] * 48)],
    "square": [np.array([(1, -1), (1, 1), (-1, 1), (-1, -1)]) / math.sqrt(2)],
    "triangle": [_spokes([1.0] * 3)],
    "star": [_spokes([1.0, 0.42] * 5)],
    "ring": [_spokes([1.0] * 48), _spokes([0.52] * 48)],
    "cross": [np.array(_CROSS) / math.sqrt(10)],
}


def _outline(kind: str, centre: np.ndarray, radius: float, angle: float) -> list[np.ndarray]:
    """Closed contours (N, 2) in pixels."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return [centre + radius * (contour @ turn) for contour in _UNIT_OUTLINES[kind]]


def _area(contours: list[np.ndarray]) -> float:
    whole, *holes = (cv2.contourArea(contour.astype(np.float32)) for contour in contours)
    return whole - sum(holes)


def _coverage(contours: list[np.ndarray], height: int, width: int, line: float = 0.0) -> np.ndarray:
    """How much of each pixel the shape (or, with `line` pixels of width, its edge) covers, 0 to 255."""
    canvas = np.zeros((height * _SUPERSAMPLE, width * _SUPERSAMPLE), np.uint8)
    points = [np.rint((contour * _SUPERSAMPLE - 0.5) * 16).astype(np.int32) for contour in contours]
    if line:
        cv2.polylines(canvas, points, True, 255, max(1, round(line * _SUPERSAMPLE)), shift=4)
    else:
        cv2.fillPoly(canvas, points, 255, shift=4)  # even-odd, so that a second contour cuts a hole
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A plane rising from 0 to 1 across the picture in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:height, 0:width]
    plane = math.cos(angle) * columns + math.sin(angle) * rows
    return (plane - plane.min()) / np.ptp(plane)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    first, second = (_colour(rng, (0.05, 0.5), (0.3, 0.95)) for _ in range(2))
    style = rng.choice(["gradient", "clouds", "stripes", "grain"])
    if style == "clouds":
        grid = rng.uniform(0, 1, (rng.integers(4, 9), rng.integers(4, 9))).astype(np.float32)
        mix = np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    elif style == "stripes":
        mix = 0.5 + 0.5 * np.tanh(3 * np.sin(_ramp(rng, height, width) * 2 * math.pi * rng.integers(4, 12)))
        second = 0.65 * first + 0.35 * second  # full contrast would drown the objects
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
    choices = [_colour(rng, (0.35, 1.0), (0.35, 1.0)) for _ in range(6)]
    # An object the colour of what lies behind it would be invisible, so the first that differs enough is taken, or else the best.
    distances = [float(np.linalg.norm(colour - behind)) for colour in choices]
    colour = choices[next((i for i, distance in enumerate(distances) if distance > 90), int(np.argmax(distances)))]
    shade = 0.75 + 0.45 * _ramp(rng, height, width)
    alpha = cover[:, :, None] / np.float32(255)
    image += alpha * (colour * shade[:, :, None] - image)
    edge = _coverage(contours, height, width, line=float(np.clip(0.12 * radius, 0.6, 3.0)))
    image += alpha * (edge[:, :, None] / np.float32(255)) * (colour * rng.uniform(0.3, 0.6) - image)


def _add(rng: np.random.Generator, scene: _Scene, kind: int, radius: float, members: int = 1) -> None:
    """Place one object, or a crowd of `members` small ones; leave it out when no tried place shows it and all earlier ones well."""
    height, width = scene.owner.shape
    for _ in range(12):
        middle = rng.uniform((0.06 * width, 0.06 * height), (0.94 * width, 0.94 * height))
        spread = 1.4 * radius * math.sqrt(members) if members > 1 else 0.0
        parts, mask, area = [], np.zeros((height, width), bool), 0.0
        for _ in range(members):
            size = radius * rng.uniform(0.85, 1.2) if members > 1 else radius
            contours = _outline(
                CLASSES[kind], middle + rng.uniform(-spread, spread, 2), size, rng.uniform(-_TILT, _TILT)
            )
            cover = _coverage(contours, height, width) >= 128
            if members > 1 and (not cover.any() or (cover & mask).any()):
                continue  # a crowd's members lie side by side
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
    if rng.random() < 0.2:  # COCO calls only areas over 96 x 96 pixels large
        radii[0] = rng.uniform(0.45, 0.62) * short
    for radius in sorted(radii, reverse=True):  # small ones on top, or they would mostly be hidden
        _add(rng, scene, int(rng.integers(len(CLASSES))), float(radius))
    if index % _CROWD_EVERY == 5:
        _add(rng, scene, int(rng.integers(len(CLASSES))), rng.uniform(3.5, 5.0), members=int(rng.integers(12, 20)))
    return scene


def _segmentation(mask: np.ndarray, crowd: bool) -> list[list[int]] | dict[str, Any]:
    """The mask as COCO writes it: a polygon along the pixel edges, or RLE for crowds and for masks with holes or several pieces."""
    height, width = mask.shape
    if crowd:
        flat = mask.flatten(order="F")
        ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
        counts = np.diff(ends).tolist()
        return {"size": [height, width], "counts": [0, *counts] if flat[0] else counts}
    # Each pixel is doubled: OpenCV walks through pixel centres, and halving its path again gives the edge between pixels exactly.
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    encoded = mask_util.encode(np.asfortranarray(mask, np.uint8))
    if len(contours) == 1:
        path = (contours[0][:, 0] + 1) // 2
        path = path[(path != np.roll(path, 1, axis=0)).any(axis=1)]  # inner corners come twice
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
    """Whether this very dataset is already there; raises ValueError where somebody else's files are in its place."""
    refusal = f"is not a dataset drawn by halodet and is left alone; move it away or give the shapes another folder than {folder.parent}"
    names = set(os.listdir(folder)) if folder.exists() else set()
    if any(not re.fullmatch(r"\d{6}\.png", name) for name in names):
        raise ValueError(f"{folder} {refusal}")
    if not json_file.exists():
        return False
    try:
        found = json.loads(json_file.read_bytes())["info"]
        ours = found["description"] == _MAKER
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{json_file} {refusal}")
    return found == info and names == {f"{index:06d}.png" for index in range(info["num_images"])}


def _write(folder: Path, json_file: Path, info: dict[str, Any]) -> None:
    split, seed = info["split"], info["seed"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    work = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        (work / "new").mkdir()
        for index in tqdm(range(info["num_images"]), desc=f"drawing shapes, {split}", unit="image"):
            scene = _draw(np.random.default_rng((seed, _SPLITS.index(split), index)), index)
            pixels = np.clip(np.rint(scene.image), 0, 255).astype(np.uint8)
            file_name = f"{index:06d}.png"
            (work / "new" / file_name).write_bytes(cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes())
            images.append({"id": index, "file_name": file_name, "width": pixels.shape[1], "height": pixels.shape[0]})
            annotations += _annotations(scene, index, len(annotations) + 1)
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
        dataset = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (work / "json").write_text(json.dumps(dataset, sort_keys=True) + "\n", encoding="utf-8")
        # Only the json says that the dataset is whole, so the old one goes first and the new one comes last.
        json_file.unlink(missing_ok=True)
        if folder.exists():
            folder.rename(work / "old")
        (work / "new").rename(folder)
        (work / "json").replace(json_file)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_shapes(root: str | Path, split: str, num_images: int, seed: int = 0) -> Path:
    """Draw one split of the shapes dataset as `<root>/<split>/*.png` and `<root>/annotations/<split>.json`, and return the json's path.

    Image `i` depends only on `seed`, `split` and `i`; the same arguments give the same bytes. What is already there from the same
    arguments is kept, an older drawing is replaced.

    Args:
        root: folder of the dataset, made if missing.
        split: "train" or "val".
        num_images: how many images, 120 to 192 pixels a side; boxes and areas in the json are in pixels.
        seed: zero or more.

    Raises:
        ValueError: `split`, `num_images` or `seed` is out of range, or the folder holds files that were not drawn by this function.
        OSError: the folder cannot be written.
    """
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; give one of {', '.join(_SPLITS)}")
    if not 1 <= num_images <= 1_000_000 or seed < 0:
        raise ValueError(
            f"num_images is {num_images} and seed is {seed}; give 1 to 1000000 images and a seed of 0 or more"
        )
    folder, json_file = Path(root) / split, Path(root) / "annotations" / f"{split}.json"
    info = {"description": _MAKER, "version": VERSION, "split": split, "num_images": num_images, "seed": seed}
    try:
        if _is_complete(folder, json_file, info):  # before the lock, so that a read-only copy can be used
            return json_file
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(json_file)):  # the workers of a multi-GPU run all come here at once
            if not _is_complete(folder, json_file, info):
                _write(folder, json_file, info)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"cannot write the shapes dataset under {root} ({reason}); give a folder that can be written"
        ) from error
    return json_file


def _load(root: str, split: str, name: str) -> list[dict[str, Any]]:
    json_file = write_shapes(root, split, NUM_IMAGES[split])
    return load_coco_json(str(json_file), str(Path(root) / split), name)


def register_shapes(root: str | Path = "datasets/shapes") -> None:
    """Register `halodet_shapes_train` and `halodet_shapes_val` with Detectron2; the images are drawn when a split is first loaded.

    Registering the same root again does nothing, another root takes the place of the earlier one.

    Args:
        root: folder of the dataset; nothing is written to it before a split is loaded.
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
            thing_colors=list(COLOURS),
        )
