"""What tools/export.py does: load a trained detector, write the file, compare both, print a table."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halodet.data.synthetic_shapes import shape_scene
from halodet.export.check import SIZES, TOLERANCES, Comparison, compare_detectors
from halodet.export.detector import ExportableBackbone, ExportableDetector, ExportError
from halodet.export.formats import check_format, export_model
from halodet.inference import ExportedPredictor, Predictor
from halodet.inference.export_metadata import BACKBONE, ExportMetadata
from halodet.inference.runtimes import load_model
from halodet.utils.image_io import read_image

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

MASK_THRESHOLD = 0.5  # of detector_postprocess in Detectron2
MAX_CALIBRATION = 100  # images; more hardly change the measured ranges
_SCENES = 5
_BACKBONE_TOLERANCE = {"float32": 1e-4, "float16": 0.01, "int8": 0.3}  # Euclidean distance relative to the map's norm


def export_detector(
    predictor: Predictor,
    path: str | os.PathLike[str],
    form: str,
    *,
    half: bool = False,
    int8: bool = False,
    calibration: Sequence[str] = (),
    images: Sequence[str] = (),
    backbone_only: bool = False,
    show: Callable[[str], None] = print,
) -> bool:
    """Export a trained detector, or its backbone, and compare the file with the model.

    Args:
        predictor: the detector, on the CPU.
        path: the file to write.
        form: format, a key of :data:`halodet.export.FORMATS`.
        half: store weights in float16.
        int8: quantize to int8.
        calibration: image files from which the ranges of int8 are measured, at most :data:`MAX_CALIBRATION`.
        images: image files of which the first five are compared; scenes of simple shapes by default.
        backbone_only: export the backbone without the heads.
        show: prints a line.

    Returns:
        Whether the file agrees with the model. If it does not, it is kept.

    Raises:
        ExportError: the model, format or options do not fit.
        ExportedModelError: the runtime cannot load the file; an older file remains.
        ImageError: an image cannot be read.
    """
    check_format(path, form, half=half, int8=int8)
    if int8 != bool(calibration):
        raise ExportError("--int8 and --calibration need each other: give both, with 20 images or more, or neither.")
    precision = "float16" if half else "int8" if int8 else "float32"
    pictures = [read_image(file) for file in images[:_SCENES]] or [_scene(index) for index in range(_SCENES)]
    start = time.perf_counter()
    model = ExportableBackbone(predictor.model.backbone) if backbone_only else ExportableDetector(predictor.model)
    metadata = describe(predictor, model, precision)
    agrees = []

    def prepare(picture: np.ndarray) -> torch.Tensor:
        tensor = predictor.model_input(picture)["image"]
        return normalize(predictor.model, tensor) if backbone_only else tensor

    def read() -> Iterator[np.ndarray]:
        for file in tqdm(_spread(calibration), "reading", unit="image"):
            yield prepare(read_image(file)).numpy()

    def check(file: Path) -> None:
        files = [file, file.with_suffix(".bin")] if form == "openvino" else [file]
        size, seconds = sum(part.stat().st_size for part in files) / 2**20, time.perf_counter() - start
        show(f"{os.fspath(path)}: {size:.1f} MiB, {precision}, in {seconds:.0f} s")
        if isinstance(model, ExportableBackbone):
            agrees.append(_check_backbone(predictor, model, file, form, pictures, precision, show))
        else:
            agrees.append(_check_detector(predictor, ExportedPredictor(file), pictures, precision, show))

    example = prepare(pictures[0])
    export_model(model, path, form, metadata, example, half=half, calibration=read() if int8 else None, check=check)
    return agrees[0]


def describe(predictor: Predictor, model: ExportableDetector | ExportableBackbone, precision: str) -> ExportMetadata:
    """Return what the file says about itself."""
    resize = _resize_of(predictor.aug)
    panoptic = None
    if hasattr(predictor.model, "combine_overlap_thresh"):
        panoptic = {
            "overlap_threshold": predictor.model.combine_overlap_thresh,
            "stuff_area_limit": predictor.model.combine_stuff_area_thresh,
            "instances_confidence_threshold": predictor.model.combine_instances_score_thresh,
        }
    return ExportMetadata(
        detector=BACKBONE if isinstance(model, ExportableBackbone) else type(predictor.model).__name__,
        input_format=predictor.input_format,
        min_size=resize.short_edge_length[0] if resize else 0,
        max_size=resize.max_size if resize else 1,
        classes=[{"id": entry["id"], "name": entry["name"]} for entry in predictor.classes],
        stuff_classes=predictor.stuff_classes,
        score_threshold=score_threshold(predictor.model),
        mask_threshold=MASK_THRESHOLD,
        outputs=model.outputs,
        sem_seg_stride=getattr(model, "sem_seg_stride", None) or 1,
        panoptic=panoptic,
        weights_sha256=hash_weights(predictor.model),
        precision=precision,
    )


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def normalize(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Return an image as the backbone takes it, (1, 3, H, W)."""
    return ((image - model.pixel_mean) / model.pixel_std)[None]


def _check_detector(
    predictor: Predictor,
    exported: ExportedPredictor,
    images: Sequence[np.ndarray],
    precision: str,
    show: Callable[[str], None],
) -> bool:
    tolerance = TOLERANCES[precision]
    options = {"threshold": score_threshold(predictor.model), "limit": max_detections(predictor.model)}
    compared = compare_detectors(predictor, exported, images, **options, margin=tolerance.margin)
    comparisons = list(tqdm(compared, "comparing", unit="image", total=len(SIZES)))
    show(comparison_table(comparisons))
    if not any(comparison.usable for comparison in comparisons):
        show(
            "The file was not checked: the model finds nothing in these images. Fix: give images of your data with "
            "--images, and trained weights."
        )
        return False
    wrong = [c for c in comparisons if not c.agrees(tolerance)]
    if wrong:
        sizes = ", ".join(f"{c.size[0]}x{c.size[1]}" for c in wrong)
        count = f"{len(wrong)} of {len(comparisons)} sizes"
        show(f"The file disagrees with the model at {count}: {sizes}. Limits: {tolerance}.")
    else:
        show(f"The file agrees with the model at {len(comparisons)} sizes.")
    return not wrong


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return the table of differences, one line for each image."""
    rows = [
        [f"{c.size[0]}x{c.size[1]}", c.expected, c.found, c.matched, f"{c.score:.1e}", f"{c.box:.1e}"]
        + [f"{x:.1e}" for x in (c.mask, c.mean_mask, c.pixels) if x is not None]
        for c in comparisons
    ]
    headers = ["image", "model finds", "file finds", "same class and place", "scores", "boxes (px)"]
    headers += ["masks", "mean of masks"] * (comparisons[0].mask is not None) + ["segments"] * (
        comparisons[0].pixels is not None
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _check_backbone(
    predictor: Predictor,
    model: ExportableBackbone,
    path: Path,
    form: str,
    pictures: Sequence[np.ndarray],
    precision: str,
    show: Callable[[str], None],
) -> bool:
    run, rows, differences = _open_backbone(path, form, model.outputs), [], []
    for number, (height, width) in enumerate(SIZES):
        picture = cv2.resize(pictures[number % len(pictures)], (width, height))
        picture = picture[:, :, ::-1] if predictor.input_format == "RGB" else picture
        image = normalize(predictor.model, torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32)))
        images = torch.cat([image, image.flip(3)][: 1 + number % 2])
        with torch.no_grad():
            expected, found = model(images), run(images.numpy())
        relative = [
            map_difference(feature.numpy(), np.asarray(found[name]))
            for name, feature in zip(model.outputs, expected, strict=True)
        ]
        rows.append([f"{len(images)}x{height}x{width}", *(f"{x:.1e}" for x in relative)])
        differences += relative
    show(tabulate(rows, ["images", *model.outputs], tablefmt="github", disable_numparse=True))
    limit, worst = _BACKBONE_TOLERANCE[precision], float(np.max(differences))  # NaN, if there is one
    show(
        f"The file {'agrees' if worst <= limit else 'disagrees'} with the model: distance {worst:.1e} of the norm of a "
        f"map, limit {limit:.0e}."
    )
    return worst <= limit


def map_difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the Euclidean distance of two feature maps relative to the norm of the first; inf for other shapes."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.linalg.norm(expected - found) / np.linalg.norm(expected))


def _open_backbone(path: Path, form: str, names: Sequence[str]) -> Callable[[np.ndarray], Mapping[str, Any]]:
    if form != "pt2":
        return load_model(path).run
    module = torch.export.load(str(path)).module()
    return lambda images: dict(zip(names, module(torch.from_numpy(images)), strict=True))


def _resize_of(augmentation: Any) -> T.ResizeShortestEdge | None:
    """Return the resizing of a predictor, None without one."""
    parts = [augmentation] if isinstance(augmentation, T.ResizeShortestEdge) else list(augmentation.augs)
    if len(parts) > 1 or not all(isinstance(part, T.ResizeShortestEdge) for part in parts):
        raise ExportError(f"test augmentations {parts} cannot be exported: expected one ResizeShortestEdge")
    return parts[0] if parts else None


def score_threshold(model: nn.Module) -> float:
    """Return the minimum score of the detections of a model."""
    return float(getattr(_box_predictor(model), "test_score_thresh", 0.0))


def max_detections(model: nn.Module) -> int:
    """Return the maximum number of detections of a model in an image."""
    names = ("test_topk_per_image", "max_detections_per_image")
    return next(int(getattr(_box_predictor(model), name)) for name in names if hasattr(_box_predictor(model), name))


def _box_predictor(model: nn.Module) -> Any:
    """Return the module that selects detections: the last box predictor, or a RetinaNet itself."""
    if not hasattr(model, "roi_heads"):
        return model
    predictor: Any = model.roi_heads.box_predictor
    return predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor


def _scene(index: int) -> np.ndarray:
    image = shape_scene("val", index).image
    return np.ascontiguousarray(np.clip(np.rint(image), 0, 255).astype(np.uint8)[:, :, ::-1])


def _spread(files: Sequence[str]) -> Sequence[str]:
    """Return at most :data:`MAX_CALIBRATION` files, spread evenly."""
    chosen = np.linspace(0, len(files) - 1, min(len(files), MAX_CALIBRATION)).round().astype(int)
    return [files[index] for index in chosen]
