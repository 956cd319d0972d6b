"""Datasets, data loaders and transforms. Importing the package registers the synthetic shapes datasets."""

from halodet.data.coco import Issue, ValidatedCoco, check_same_categories, register_validated, validate_coco
from halodet.data.resumable_loader import ResumableTrainLoader
from halodet.data.synthetic_shapes import register_shapes, write_shapes
from halodet.errors import DatasetError

register_shapes()

__all__ = [
    "DatasetError",
    "Issue",
    "ResumableTrainLoader",
    "ValidatedCoco",
    "check_same_categories",
    "register_shapes",
    "register_validated",
    "validate_coco",
    "write_shapes",
]
