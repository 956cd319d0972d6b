"""What tools/export.py does: load a trained detector, write the file, compare both, print a table."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halodet.data.synthetic_shapes import shape_scene
from halodet.export.check import SIZES, TOLERANCES, Comparison, compare_detectors
from halodet.export.detector import ExportableBackbone, ExportableDetector, ExportError
from halodet.export.formats import export_model
from halodet.inference import ExportedPredictor, Predictor
from halodet.inference.export_metadata import BACKBONE, ExportMetadata
from halodet.inference.runtimes import load_model
from halodet.utils.image_io import read_image

import numpy as np
import torch
from detectron2.data import transforms as T
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

MASK_THRESHOLD = 0.5  # of detector_postprocess in Detectron2
MAX_CALIBRATION = 100  # images; more hardly change the measured ranges
_SCENES = 5
_BACKBONE_TOLERANCE = {"float32": 1e-3, "float16": 0.02, "int8": 1.0}  # relative to the largest value of a map


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
        half: export in float16.
        int8: quantize to int8.
        calibration: image files from which the ranges of int8 are measured.
        images: image files to compare with; scenes of simple shapes by default.
        backbone_only: export the backbone without the heads.
        show: prints a line.

    Returns:
        Whether the file agrees with the model.

    Raises:
        ExportError: the model, format or options do not fit.
        ImageError: an image cannot be read.
    """
    if int8 != bool(calibration):
        raise ExportError("--int8 and --calibration need each other: give both, with 20 images or more, or neither.")
    precision = "float16" if half else "int8" if int8 else "float32"
    pictures = [read_image(file) for file in images[:_SCENES]] or [_scene(index) for index in range(_SCENES)]
    start = time.perf_counter()
    model = ExportableBackbone(predictor.model.backbone) if backbone_only else ExportableDetector(predictor.model)
    metadata = describe(predictor, model, precision)
    example = predictor.model_input(pictures[0])["image"]
    progress = tqdm(_some(calibration), "reading", unit="image", disable=not calibration)
    measured = [predictor.model_input(read_image(file))["image"] for file in progress]
    if backbone_only:
        example, measured = normalize(predictor.model, example), [normalize(predictor.model, x) for x in measured]
    files = export_model(model, path, form, metadata, example, half=half, calibration=[x.numpy() for x in measured])
    size = sum(file.stat().st_size for file in files) / 2**20
    seconds = time.perf_counter() - start
    show(f"Wrote {', '.join(map(str, files))}: {size:.1f} MiB, {precision}, in {seconds:.0f} s")
    if isinstance(model, ExportableBackbone):
        return _check_backbone(model, Path(path), form, precision, show)
    return _check_detector(predictor, ExportedPredictor(path), pictures, precision, show)


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
        score_threshold=_score_threshold(predictor.model),
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
    comparisons = list(
        tqdm(
            compare_detectors(predictor, exported, images, margin=tolerance.margin),
            "comparing",
            unit="image",
            total=len(SIZES),
        )
    )
    show(comparison_table(comparisons))
    if not any(comparison.usable for comparison in comparisons):
        show(
            "The file was not checked: the model finds nothing in these images. Fix: give images of your data with "
            "--images, and trained weights."
        )
        return False
    wrong = [c for c in comparisons if not c.agrees(tolerance)]
    if wrong:
        sizes = ", ".join(f"{c.size[0]}×{c.size[1]}" for c in wrong)
        count = f"{len(wrong)} of {len(comparisons)} sizes"
        show(f"The file disagrees with the model at {count}: {sizes}. Limits: {tolerance}.")
    else:
        show(f"The file agrees with the model at {len(comparisons)} sizes.")
    return not wrong


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return the table of differences, one line for each image."""
    rows = [
        [f"{c.size[0]}×{c.size[1]}", c.expected, c.found, c.matched, f"{c.score:.1e}", f"{c.box:.1e}"]
        + [f"{x:.1e}" for x in (c.mask, c.pixels) if x is not None]
        for c in comparisons
    ]
    headers = ["image", "model finds", "file finds", "same class and place", "scores", "boxes (px)"]
    headers += ["masks"] * (comparisons[0].mask is not None) + ["segments"] * (comparisons[0].pixels is not None)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _check_backbone(
    model: ExportableBackbone, path: Path, form: str, precision: str, show: Callable[[str], None]
) -> bool:
    run, rows, worst = _open_backbone(path, form, model.outputs), [], 0.0
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate(SIZES):
        images = torch.randn(1 + number % 2, 3, height, width, generator=generator)
        with torch.no_grad():
            expected, found = model(images), run(images.numpy())
        relative = [
            float((feature - torch.as_tensor(found[name])).abs().max() / feature.abs().max())
            for name, feature in zip(model.outputs, expected, strict=True)
        ]
        rows.append([f"{len(images)}×{height}×{width}", *(f"{x:.1e}" for x in relative)])
        worst = max(worst, *relative)
    show(tabulate(rows, ["images", *model.outputs], tablefmt="github", disable_numparse=True))
    good = worst <= _BACKBONE_TOLERANCE[precision]
    limit = f"{worst:.1e} of the largest value, limit {_BACKBONE_TOLERANCE[precision]:.0e}"
    show(f"The file {'agrees' if good else 'disagrees'} with the model: {limit}.")
    return good


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


def _score_threshold(model: nn.Module) -> float:
    if not hasattr(model, "roi_heads"):
        return float(getattr(model, "test_score_thresh", 0.0))
    predictor = model.roi_heads.box_predictor
    predictor = predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor
    return float(predictor.test_score_thresh)


def _scene(index: int) -> np.ndarray:
    image = shape_scene("val", index).image
    return np.ascontiguousarray(np.clip(np.rint(image), 0, 255).astype(np.uint8)[:, :, ::-1])


def _some(files: Sequence[str]) -> Sequence[str]:
    """Return at most :data:`MAX_CALIBRATION` files, spread evenly."""
    step = max(1, -(-len(files) // MAX_CALIBRATION))
    return files[::step]
