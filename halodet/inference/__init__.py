"""Inference with a trained detector: read an image, predict, draw, convert to COCO results.

The names in ``__all__`` are imported on first use: :class:`Predictor` needs PyTorch and Detectron2, and nothing else
does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from halodet.utils.import_errors import explain_import_errors

if TYPE_CHECKING:
    from halodet.inference.as_bgr import PredictorError
    from halodet.inference.detections import Detections, to_coco
    from halodet.inference.export_metadata import ExportMetadata
    from halodet.inference.exported import ExportedModelError, ExportedPredictor
    from halodet.inference.predictor import Predictor
    from halodet.inference.visualize import draw
    from halodet.utils.image_io import read_image

__all__ = [
    "Detections",
    "ExportMetadata",
    "ExportedModelError",
    "ExportedPredictor",
    "Predictor",
    "PredictorError",
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
    "draw": "inference.visualize",
    "read_image": "utils.image_io",
    "to_coco": "inference.detections",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'halodet.inference' has no attribute {name!r}")
    with explain_import_errors():
        value = getattr(importlib.import_module(f"halodet.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
