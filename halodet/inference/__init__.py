"""Inference with a trained detector: predict, draw, convert to COCO results."""

from halodet.data.classes import CLASSES_FILE, ClassesError, read_classes, write_classes
from halodet.data.image_io import read_image
from halodet.inference.predictor import Predictor, to_coco
from halodet.inference.visualize import draw

__all__ = [
    "CLASSES_FILE",
    "ClassesError",
    "Predictor",
    "draw",
    "read_classes",
    "read_image",
    "to_coco",
    "write_classes",
]
