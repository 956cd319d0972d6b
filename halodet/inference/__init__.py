"""Inference with a trained detector: read an image, predict, draw, convert to COCO results."""

from halodet.inference.predictor import Predictor, PredictorError, to_coco
from halodet.inference.visualize import draw
from halodet.utils.image_io import read_image

__all__ = ["Predictor", "PredictorError", "draw", "read_image", "to_coco"]
