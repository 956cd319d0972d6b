"""Check config values that Detectron2 and the model would reject late, without a clear message, or not at all."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from functools import reduce
from operator import getitem
from typing import Any

from halodet.attention.triton_ops import triton_unavailable_reason
from halodet.errors import ConfigError
from halodet.solver.build import OPTIMIZERS
from halodet.solver.lr_scaling import scale_to_batch

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler

logger = logging.getLogger(__name__)

_INTERVALS = {
    "[0, inf)": (
        "DATALOADER.NUM_WORKERS", "DATALOADER.REPEAT_THRESHOLD", "INPUT.MIN_SIZE_TEST", "SOLVER.STEPS",
        "SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "SOLVER.GAMMA", "SOLVER.MOMENTUM", "SOLVER.BIAS_LR_FACTOR",
        "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.WEIGHT_DECAY_REL_POS",
        "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        "SOLVER.CHECKPOINT_MAX_TO_KEEP", "SOLVER.NON_FINITE_MAX_STEPS", "TEST.EVAL_PERIOD", "TEST.VIS_PERIOD",
        "TEST.VIS_IMAGES",
    ),
    "[1, inf)": (
        "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST", "INPUT.LSJ.SIZE", "SOLVER.IMS_PER_BATCH",
        "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.GRAD_ACCUM_STEPS", "MODEL.ROI_HEADS.NUM_CLASSES",
        "MODEL.RETINANET.NUM_CLASSES",
    ),
    "[-1, inf)": ("TEST.DETECTIONS_PER_IMAGE",),  # -1: all
    "[-inf, 2147483648)": ("SEED",),  # numpy accepts seeds below 2**32, and each rank adds to it
    "(0, inf)": ("INPUT.LSJ.MIN_SCALE", "INPUT.LSJ.MAX_SCALE", "SOLVER.BACKBONE_LR_MULTIPLIER"),
    "[0, 1]": ("DATALOADER.MAX_BAD_IMAGES", "MODEL.WEIGHTS_MIN_LOADED"),
    "(0, 1]": ("INPUT.COPY_PASTE.PROBABILITY", "SOLVER.LR_LAYER_DECAY"),
    "[0, 1)": ("MODEL.EMA.DECAY",),
}  # fmt: skip
_CHOICES = {
    "SOLVER.AMP.PRECISION": ("bf16", "fp16"),
    "SOLVER.NON_FINITE_POLICY": ("stop", "skip"),
    "SOLVER.OPTIMIZER_NAME": OPTIMIZERS,
}
# Keys of Detectron2, for which a project may have further values.
_DETECTRON2_CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler", "RepeatFactorTrainingSampler", "WeightedTrainingSampler", "WeightedCategoryTrainingSampler",
    ),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
}  # fmt: skip
_TRAINING = (
    "DATALOADER.", "INPUT.COPY_PASTE.", "INPUT.CROP.", "INPUT.LSJ.", "INPUT.MASK_FORMAT", "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TRAIN", "INPUT.RANDOM_FLIP", "MODEL.EMA.", "SEED", "SOLVER.",
)  # fmt: skip


def validate(cfg: CfgNode, *, train: bool = True, extended: bool = False) -> None:
    """Check the values of a config that is not frozen; without a GPU, MODEL.DEVICE cuda becomes cpu.

    Args:
        cfg: the config.
        train: whether to check the keys that only training uses.
        extended: whether another project's code may know more values of Detectron2's keys: samplers, schedules, ....

    Raises:
        ConfigError: a value is invalid; names the key, the value found and the value expected.
    """
    unused = () if train else _TRAINING
    for interval, keys in _INTERVALS.items():
        for key in (key for key in keys if not key.startswith(unused)):
            value = _value(cfg, key)
            numbers = value if isinstance(value, (tuple, list)) else [] if value is None else [value]
            if not all(_inside(number, interval) for number in numbers):
                raise _invalid(key, value, f"a number in {interval}")
    for key, choices in (_CHOICES if extended else {**_DETECTRON2_CHOICES, **_CHOICES}).items():
        if _value(cfg, key) not in choices and not key.startswith(unused):
            raise _invalid(key, _value(cfg, key), f"one of {', '.join(choices)}")
    device = _validate_device(cfg)
    _validate_compiled_operators(cfg)
    if not train:
        return
    lsj, paste, amp = cfg.INPUT.LSJ, cfg.INPUT.COPY_PASTE, cfg.SOLVER.AMP
    repeats = cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    no_compiler = device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "gcc", "clang++")))
    no_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    for invalid, key, expected in (
        (not cfg.INPUT.MIN_SIZE_TRAIN, "INPUT.MIN_SIZE_TRAIN", "at least one size"),
        (repeats and not cfg.DATALOADER.REPEAT_THRESHOLD, "DATALOADER.REPEAT_THRESHOLD", "more than 0, such as 0.001"),
        (lsj.MIN_SCALE > lsj.MAX_SCALE, "INPUT.LSJ.MIN_SCALE", f"at most INPUT.LSJ.MAX_SCALE={lsj.MAX_SCALE}"),
        (lsj.ENABLED and cfg.INPUT.CROP.ENABLED, "INPUT.CROP.ENABLED", "False with INPUT.LSJ.ENABLED"),
        (paste.ENABLED and not cfg.MODEL.MASK_ON, "MODEL.MASK_ON", "True with INPUT.COPY_PASTE.ENABLED"),
        (paste.ENABLED and cfg.MODEL.KEYPOINT_ON, "MODEL.KEYPOINT_ON", "False with INPUT.COPY_PASTE.ENABLED"),
        (amp.ENABLED and amp.PRECISION == "fp16" and device.type == "cpu", "SOLVER.AMP.PRECISION", "bf16 on the CPU"),
        (amp.ENABLED and amp.PRECISION == "bf16" and no_bf16, "SOLVER.AMP.PRECISION", "fp16 on this GPU"),
        (cfg.MODEL.COMPILE and no_compiler, "MODEL.COMPILE", "False without a C++ compiler (g++) on the PATH"),
        (cfg.WANDB.ENABLED and not _installed("wandb"), "WANDB.ENABLED", "False without wandb (pip install wandb)"),
    ):
        if invalid:
            raise _invalid(key, _value(cfg, key), expected)
    if cfg.SOLVER.LR_SCHEDULER_NAME in _DETECTRON2_CHOICES["SOLVER.LR_SCHEDULER_NAME"]:
        _validate_schedule(cfg)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line; a KeyError's bare key with the type before it."""
    message = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    bare = isinstance(error, KeyError) and " " not in message
    return f"KeyError {message!r}" if bare else message or type(error).__name__


def _validate_device(cfg: CfgNode) -> torch.device:
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("CUDA is not available; using MODEL.DEVICE=cpu")
        cfg.MODEL.DEVICE = "cpu"
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise _invalid("MODEL.DEVICE", cfg.MODEL.DEVICE, "cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _invalid("MODEL.DEVICE", cfg.MODEL.DEVICE, f"an index below {torch.cuda.device_count()}")
    for key in ("MODEL.HALONET.BACKEND", "MODEL.HALODET_TIMM.BACKEND"):
        reason = triton_unavailable_reason(device) if _value(cfg, key) == "triton" else None
        if reason:
            raise _invalid(key, "triton", f"auto ({reason})")
    return device


def _validate_compiled_operators(cfg: CfgNode) -> None:
    """Rotated boxes and deformable convolution need Detectron2's compiled extension, which not every build has."""
    needed = {
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE),
        "MODEL.PROPOSAL_GENERATOR.NAME": cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN",
        "MODEL.ROI_HEADS.NAME": cfg.MODEL.ROI_HEADS.NAME == "RROIHeads",
    }
    for key in (key for key, used in needed.items() if used):
        try:
            from detectron2 import _C  # noqa: F401
        except ImportError as error:
            raise _invalid(key, _value(cfg, key), "a detectron2 with compiled operators") from error


def _validate_schedule(cfg: CfgNode) -> None:
    try:
        cfg = scale_to_batch(cfg, log=False)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR))
    except (ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"The learning rate schedule of SOLVER is invalid: {one_line(error)}.") from error


def _invalid(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{key}={value} is invalid: expected {expected}.")


def _inside(value: Any, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = isinstance(value, (int, float)) and (low <= value if interval[0] == "[" else low < value)
    return above and (value <= high if interval[-1] == "]" else value < high)


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder "wandb" of runs is a package without files


def _value(cfg: CfgNode, key: str) -> Any:
    return reduce(getitem, key.split("."), cfg)
