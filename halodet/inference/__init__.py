"""Asking a trained detector about pictures: read an image, predict, draw."""

from halodet.data.classes import CLASSES_FILE, ClassesError, read_classes, write_classes
from halodet.data.image_io import read_image
from halodet.errors import ImageError
from halodet.inference.predictor import Predictor, PredictorError, to_coco
from halodet.inference.visualize import draw
from halodet.utils.io import write_json

__all__ = [
    "CLASSES_FILE",
    "ClassesError",
    "ImageError",
    "Predictor",
    "PredictorError",
    "draw",
    "read_classes",
    "read_image",
    "to_coco",
    "write_classes",
    "write_json",
]
