"""Inference with a trained detector: read an image, predict, draw, convert to COCO results.

The names in ``__all__`` are imported on first use: :class:`Predictor` needs PyTorch and Detectron2, and nothing else
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from halodet.utils.import_errors import explain_import_errors, lazy_names

with explain_import_errors():
    import cv2  # noqa: F401  # all of the package needs it

if TYPE_CHECKING:
    from halodet.inference.as_bgr import PredictorError
    from halodet.inference.detections import Detections, to_coco
    from halodet.inference.export_metadata import ExportMetadata
    from halodet.inference.exported import ExportedModelError, ExportedPredictor
    from halodet.inference.predictor import Predictor
    from halodet.inference.result import Result, ResultError
    from halodet.inference.tracking import Tracker, TrackerError
    from halodet.inference.video_errors import VideoEndedEarly, VideoError
    from halodet.inference.video_reader import VideoReader
    from halodet.inference.video_writer import VideoWriter
    from halodet.inference.visualize import draw
    from halodet.utils.image_io import read_image

__all__ = [
    "Detections",
    "ExportMetadata",
    "ExportedModelError",
    "ExportedPredictor",
    "Predictor",
    "PredictorError",
    "Result",
    "ResultError",
    "Tracker",
    "TrackerError",
    "VideoEndedEarly",
    "VideoError",
    "VideoReader",
    "VideoWriter",
    "draw",
    "read_image",
    "to_coco",
]

_MODULES = {
    "Detections": "inference.detections",
    "ExportMetadata": "inference.export_metadata",
    "ExportedModelError": "inference.export_metadata",
    "ExportedPredictor": "inference.exported",
    "Predictor": "inference.predictor",
    "PredictorError": "inference.as_bgr",
    "Result": "inference.result",
    "ResultError": "inference.result",
    "Tracker": "inference.tracking",
    "TrackerError": "inference.tracking",
    "VideoEndedEarly": "inference.video_errors",
    "VideoError": "inference.video_errors",
    "VideoReader": "inference.video_reader",
    "VideoWriter": "inference.video_writer",
    "draw": "inference.visualize",
    "read_image": "utils.image_io",
    "to_coco": "inference.detections",
}


__getattr__, __dir__ = lazy_names(globals(), _MODULES)
