"""What a config can ask of PyTorch to spend less time or memory on the same numbers."""

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
    """What SOLVER.AMP asks to compute in, None for the parameters' own."""
    return PRECISIONS[cfg.SOLVER.AMP.PRECISION] if cfg.SOLVER.AMP.ENABLED else None


def speed_up(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Do to a detector what MODEL.TF32, MODEL.CHANNELS_LAST and MODEL.COMPILE ask for; names in its state dict stay as they are."""
    if cfg.MODEL.TF32 is not None:  # for the whole process: PyTorch knows no other way
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.MODEL.TF32
    if cfg.MODEL.CHANNELS_LAST:
        model.backbone.to(
            memory_format=torch.channels_last
        )  # what a convolution with such weights returns has channels last, too
    if cfg.MODEL.COMPILE:
        model.backbone.compile()
    return model


class CompileError(TrainingStopped):
    """PyTorch cannot compile the backbone."""

    exit_code = 2

    def __init__(self, error: Exception) -> None:
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(
            tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"
        )
        reason = " ".join(str(error).partition("\n\n")[0].split()).rstrip(
            ".: "
        )  # what follows tells how to ask for more
        super().__init__(
            f"MODEL.COMPILE: PyTorch cannot compile the backbone ({reason}): set it to False, or, where an earlier run was killed while it "
            f"compiled, remove what that left in {folder}"
        )


def compile_errors(cfg: CfgNode) -> tuple[type[Exception], ...]:
    """What PyTorch raises where compiling fails; nothing without MODEL.COMPILE."""
    if not cfg.MODEL.COMPILE:
        return ()
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)
