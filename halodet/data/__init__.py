"""Datasets: the built-in drawn shapes (registered on import) and checked COCO json files of the user's own."""

from halodet.data.coco import Fault, ValidatedCoco, check_same_categories, register_checked, validate_coco
from halodet.data.resumable_loader import ResumableTrainLoader
from halodet.data.synthetic_shapes import register_shapes, write_shapes
from halodet.errors import DatasetError

register_shapes()

__all__ = [
    "ValidatedCoco",
    "DatasetError",
    "Fault",
    "ResumableTrainLoader",
    "validate_coco",
    "check_same_categories",
    "register_checked",
    "register_shapes",
    "write_shapes",
]
