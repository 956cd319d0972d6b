"""Datasets, data loaders and transforms. Importing the package registers the synthetic shapes datasets."""

from halodet.data.bad_images import SkipTrackingLoader
from halodet.data.build import build_detection_test_loader, load_train_dataset
from halodet.data.coco import ValidatedCoco, match_categories, register_validated, validate_coco
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.data.issues import Issue
from halodet.data.resumable_loader import ResumableTrainLoader
from halodet.data.shape_layouts import register_shape_layouts, write_layouts
from halodet.data.synthetic_shapes import register_shapes, write_shapes
from halodet.errors import DatasetError

register_shapes()
register_shape_layouts()

__all__ = [
    "DatasetError",
    "Issue",
    "ResumableTrainLoader",
    "RobustDatasetMapper",
    "SkipTrackingLoader",
    "ValidatedCoco",
    "build_detection_test_loader",
    "load_train_dataset",
    "match_categories",
    "register_shape_layouts",
    "register_shapes",
    "register_validated",
    "validate_coco",
    "write_layouts",
    "write_shapes",
]
