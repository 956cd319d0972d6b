"""Export of trained detectors to files that run without Detectron2, each compared with its model."""

from halodet.export.check import Comparison, compare_detectors
from halodet.export.detector import ExportableBackbone, ExportableDetector, ExportError
from halodet.export.formats import FORMATS, export_model

__all__ = [
    "FORMATS",
    "Comparison",
    "ExportError",
    "ExportableBackbone",
    "ExportableDetector",
    "compare_detectors",
    "export_model",
]
