"""Asking a trained detector about pictures: read an image, predict, draw."""

from halodet.inference.classes import CLASSES_FILE, ClassesError, read_classes, write_classes
from halodet.inference.draw import draw
from halodet.inference.image import ImageError, read_image
from halodet.inference.json_file import write_json
from halodet.inference.predict import Predictor, PredictorError, to_coco

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
