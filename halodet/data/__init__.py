"""Datasets: the built-in drawn shapes (registered on import) and checked COCO json files of the user's own."""

from .coco_json import CheckedJson, DatasetError, Fault, check_coco_json, check_same_categories, register_checked
from .shapes import register_shapes, write_shapes
from .stream import TrainStream

register_shapes()

__all__ = [
    "CheckedJson",
    "DatasetError",
    "Fault",
    "TrainStream",
    "check_coco_json",
    "check_same_categories",
    "register_checked",
    "register_shapes",
    "write_shapes",
]
