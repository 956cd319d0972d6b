"""Reading and writing weights, and loading them with proof that they arrived; importing this package makes Detectron2 know ``timm://``."""

from halodet.checkpoint.checkpointer import Checkpointer, check_fit, load_weights, with_query
from halodet.checkpoint.io import read_checkpoint, write_weights
from halodet.checkpoint.latest import Found, latest_checkpoint, numbered
from halodet.checkpoint.matching import match
from halodet.checkpoint.model_spec import ModelSpec
from halodet.checkpoint.report import LoadReport
from halodet.checkpoint.timm_hub import TimmHandler
from halodet.errors import CheckpointError, CheckpointWriteError

__all__ = [
    "Checkpointer",
    "Found",
    "LoadReport",
    "ModelSpec",
    "TimmHandler",
    "CheckpointError",
    "CheckpointWriteError",
    "check_fit",
    "load_weights",
    "match",
    "latest_checkpoint",
    "numbered",
    "read_checkpoint",
    "with_query",
    "write_weights",
]
