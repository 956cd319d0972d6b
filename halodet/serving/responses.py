"""JSON answers of the server."""

from __future__ import annotations

from typing import Any, Literal, get_args

from halodet.inference.detections import encode_mask
from halodet.inference.result import Result
from halodet.serving.polygons import mask_to_polygons

import numpy as np

__all__ = ["MASK_FORMATS", "MaskFormat", "detections_dataset", "found_segments", "prediction"]

MaskFormat = Literal["rle", "polygons", "none"]
MASK_FORMATS: tuple[str, ...] = get_args(MaskFormat)


def prediction(result: Result, score_threshold: float, masks: MaskFormat) -> dict[str, Any]:
    """Return the answer of ``POST /predict``.

    Args:
        result: the objects and segments to return.
        score_threshold: minimum score that they were selected with.
        masks: format of ``segmentation``.
    """
    height, width = result.image.shape[:2]
    annotations = []
    for k, annotation in enumerate(result.to_coco()):
        found = result.masks
        if found is not None:
            _set_segmentation(annotation, found[k], masks)
        annotations.append({"id": k + 1, **annotation, "category_name": result.names[k]})
    answer = {"image": {"width": width, "height": height}, "score_threshold": score_threshold}
    answer["annotations"] = annotations
    if result.panoptic_seg is not None or result.sem_seg is not None:
        answer["segments"] = [_segment(entry, masks) for entry in found_segments(result)]
    return answer


def found_segments(result: Result) -> list[dict[str, Any]]:
    """Return the panoptic segments, or the semantic classes that occur, each with its (H, W) bool mask.

    Returns:
        Dicts with ``category_name``, ``isthing``, ``score`` where there is one, ``area`` in pixels and ``mask``.
    """
    segments: list[dict[str, Any]] = []
    if result.panoptic_seg is not None:
        ids, infos = result.panoptic_seg
        for info in infos:
            segment = {
                "category_name": result.segment_name(info),
                "isthing": bool(info["isthing"]),
                "mask": ids == info["id"],
            }
            segments.append({**segment, **({"score": float(info["score"])} if "score" in info else {})})
    elif result.sem_seg is not None:
        for k in np.unique(result.sem_seg[result.sem_seg >= 0]).tolist():
            name = result.stuff_classes[k] if k < len(result.stuff_classes) else f"class {k}"
            segments.append({"category_name": name, "isthing": False, "mask": result.sem_seg == k})
    for segment in segments:
        segment["area"] = int(segment["mask"].sum())
    return segments


def detections_dataset(result: Result, file_name: str, drawing: str) -> dict[str, Any]:
    """Return what ``tools/demo.py`` writes for one image, without the folder of the image.

    Args:
        result: the objects.
        file_name: name of the image.
        drawing: name of the drawing.
    """
    dataset = result.to_dataset(file_name)
    dataset["images"][0]["drawing"] = drawing
    return {"info": {"root": ""}, **dataset}


def _segment(entry: dict[str, Any], masks: MaskFormat) -> dict[str, Any]:
    segment = {key: value for key, value in entry.items() if key != "mask"}
    if masks == "rle":
        segment["segmentation"] = encode_mask(entry["mask"])
    _set_segmentation(segment, entry["mask"], masks)
    return segment


def _set_segmentation(annotation: dict[str, Any], mask: np.ndarray, masks: MaskFormat) -> None:
    """Replace the RLE of an annotation by another format of the mask, or remove it."""
    if masks == "polygons":
        annotation["segmentation"] = mask_to_polygons(mask)
    elif masks == "none":
        annotation.pop("segmentation", None)
