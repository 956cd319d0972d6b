"""Inference with an exported model, without PyTorch and Detectron2."""

from __future__ import annotations

import os
from typing import Any

from halodet.inference.as_bgr import ImageLike, as_bgr
from halodet.inference.base_predictor import BasePredictor
from halodet.inference.detections import Detections
from halodet.inference.export_metadata import BACKBONE, ExportedModelError, PredictionError
from halodet.inference.postprocessing import (
    combine_panoptic,
    label_map,
    paste_masks,
    resize_shortest_edge,
    resized_size,
    scale_boxes,
)
from halodet.inference.runtimes import load_model, one_line

import numpy as np

__all__ = ["ExportedModelError", "ExportedPredictor"]


class ExportedPredictor(BasePredictor):
    """Predictor of an exported model, with the results of :class:`~halodet.inference.Predictor`.

    It needs numpy, Pillow, OpenCV and the runtime: onnxruntime for .onnx files, openvino for .xml files, PyTorch for
    .torchscript files.

    Args:
        file: exported model.
        num_threads: number of CPU threads; by default the runtime chooses it.
        score_threshold: minimum score of detections, and of the objects in panoptic segments, from 0 to 1. Detections
            below that of the export are never returned. None for those of the export.

    Attributes:
        classes: dataset id and name of each class in the order of the model's outputs.
        stuff_classes: name of each class of its semantic segmentation; empty without one.
        panoptic: arguments of :func:`~halodet.inference.postprocessing.combine_panoptic`; None without panoptic
            segments.
        score_threshold: minimum score of detections.
        input_format: order of the model's input channels, ``"BGR"`` or ``"RGB"``.
        metadata: the :class:`~halodet.inference.ExportMetadata` of the file.

    Raises:
        ExportedModelError: the file cannot be used; see :func:`~halodet.inference.runtimes.load_model`.
    """

    def __init__(
        self, file: str | os.PathLike[str], *, num_threads: int | None = None, score_threshold: float | None = None
    ) -> None:
        if num_threads is not None and num_threads < 1:
            raise ExportedModelError(f"num_threads={num_threads} is invalid: expected a positive integer or None.")
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise ExportedModelError(f"score_threshold={score_threshold} is invalid: expected a number from 0 to 1.")
        self._file, self.score_threshold = os.fspath(file), score_threshold or 0.0
        self.metadata, self._run = load_model(file, num_threads)
        if self.metadata.detector == BACKBONE:
            raise ExportedModelError(f"{self._file} has a backbone only: expected a detector.")
        self.classes: list[dict[str, Any]] = [dict(entry) for entry in self.metadata.classes]
        self.stuff_classes = list(self.metadata.stuff_classes)
        self.input_format = self.metadata.input_format
        if self.metadata.panoptic is not None:
            given = {"instances_confidence_threshold": score_threshold} if score_threshold is not None else {}
            self.panoptic = {**self.metadata.panoptic, **given}

    def predict(self, image: ImageLike) -> dict[str, Any]:
        """Return all that the model predicts for an image.

        Args:
            image: see :func:`~halodet.inference.as_bgr.as_bgr`.

        Returns:
            ``instances``, a :class:`~halodet.inference.Detections`; ``sem_seg``, the (H, W) int32 semantic class of
            each pixel; ``panoptic_seg``, the (H, W) int32 segment of each pixel, 0 for none, and a list of descriptions
            of the segments. Each is there if the model predicts it.

        Raises:
            PredictionError: the model fails on the image.
            ExportedModelError: the model returns a class that its metadata does not have.
            PredictorError: the image has another shape or type.
            ImageError: a file cannot be read.
        """
        bgr, metadata = as_bgr(image), self.metadata
        size = bgr.shape[0], bgr.shape[1]
        height, width = resized_size(*size, metadata.min_size, metadata.max_size)
        channels = bgr[:, :, ::-1] if self.input_format == "RGB" else bgr
        resized = resize_shortest_edge(channels, metadata.min_size, metadata.max_size)
        try:
            outputs = self._run(np.ascontiguousarray(resized.transpose(2, 0, 1), dtype=np.float32))
        except Exception as error:  # the exceptions of the runtimes have no common base
            raise PredictionError(
                f"{self._file} failed on an image of {width} x {height} pixels: {one_line(error)}."
            ) from error
        result: dict[str, Any] = {}
        if "boxes" in outputs:
            result["instances"] = self._detections(outputs, (height, width), size)
        if "sem_seg" in outputs:
            result["sem_seg"] = label_map(outputs["sem_seg"], metadata.sem_seg_stride, (height, width), size)
        if self.panoptic is not None:
            result["panoptic_seg"] = combine_panoptic(result["instances"], result["sem_seg"], **self.panoptic)
        return result

    def _detections(
        self, outputs: dict[str, np.ndarray], resized: tuple[int, int], size: tuple[int, int]
    ) -> Detections:
        boxes, kept = scale_boxes(outputs["boxes"], resized, size)
        kept &= outputs["scores"] >= self.score_threshold
        if outputs["classes"].size and not 0 <= outputs["classes"].max() < len(self.classes):
            found = int(outputs["classes"].max())
            raise ExportedModelError(
                f"{self._file} returned the class {found}: expected at most {len(self.classes) - 1}."
            )
        boxes, scores, classes = boxes[kept], outputs["scores"][kept], outputs["classes"][kept]
        masks = None
        if "masks" in outputs:
            masks = paste_masks(outputs["masks"][kept], boxes, size, self.metadata.mask_threshold)
        return Detections(size, boxes, scores, classes.astype(np.int64, copy=False), masks)
