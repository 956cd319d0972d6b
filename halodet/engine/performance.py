"""Performance flags: TF32, channels_last, torch.compile and mixed precision."""

from __future__ import annotations

import getpass
import os
import tempfile

from halodet.errors import TrainingStopped

import torch
from detectron2.config import CfgNode
from torch import nn

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Return the autocast dtype of SOLVER.AMP; None if it is disabled."""
    return PRECISIONS[cfg.SOLVER.AMP.PRECISION] if cfg.SOLVER.AMP.ENABLED else None


def apply_performance_flags(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Apply MODEL.TF32, CHANNELS_LAST and COMPILE to a detector; the names in its state dict do not change."""
    if cfg.MODEL.TF32 is not None:  # PyTorch has it for the whole process only
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.MODEL.TF32
    if cfg.MODEL.CHANNELS_LAST:
        model.backbone.to(memory_format=torch.channels_last)
    if cfg.MODEL.COMPILE:
        model.backbone.compile()
    return model


class CompileError(TrainingStopped):
    """torch.compile fails on the backbone."""

    exit_code = 2

    def __init__(self, error: Exception) -> None:
        default_cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache
        # The first paragraph has the reason; the others are hints on debugging PyTorch.
        reason = " ".join(str(error).partition("\n\n")[0].split()).rstrip(".: ")
        super().__init__(
            f"MODEL.COMPILE=True failed: torch.compile cannot compile the backbone ({reason}). "
            f"Fix: set it to False, or remove {cache} if an earlier run was killed while it compiled."
        )


def compile_errors(cfg: CfgNode) -> tuple[type[Exception], ...]:
    """Return the exceptions that torch.compile raises; empty without MODEL.COMPILE."""
    if not cfg.MODEL.COMPILE:
        return ()
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)
