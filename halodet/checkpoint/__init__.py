"""Read, write and load checkpoints. Importing this package registers ``timm://`` with Detectron2's PathManager."""

from halodet.checkpoint.checkpointer import Checkpointer, check_fit, load_weights
from halodet.checkpoint.class_names import classes_of
from halodet.checkpoint.io import LoadedCheckpoint, read_checkpoint, read_weights, with_query, write_weights
from halodet.checkpoint.latest import latest_checkpoint, numbered
from halodet.checkpoint.matching import match
from halodet.checkpoint.model_spec import ModelSpec
from halodet.checkpoint.report import LoadReport
from halodet.checkpoint.timm_hub import TimmHandler

__all__ = [
    "Checkpointer",
    "LoadReport",
    "LoadedCheckpoint",
    "ModelSpec",
    "TimmHandler",
    "check_fit",
    "classes_of",
    "latest_checkpoint",
    "load_weights",
    "match",
    "numbered",
    "read_checkpoint",
    "read_weights",
    "with_query",
    "write_weights",
]
