"""Check config values that Detectron2 and the model would reject late, without a clear message, or not at all."""

from __future__ import annotations

import importlib.util
import logging
import shutil

from halodet.attention.triton_ops import triton_unavailable_reason
from halodet.config.intervals import check_intervals
from halodet.config.keys import get_value, invalid
from halodet.config.value_types import check_types
from halodet.errors import ConfigError
from halodet.solver.build import OPTIMIZERS
from halodet.solver.lr_scaling import scale_to_batch

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler

logger = logging.getLogger(__name__)

_CHOICES = {
    "SOLVER.AMP.PRECISION": ("bf16", "fp16"),
    "SOLVER.NON_FINITE_POLICY": ("stop", "skip"),
    "SOLVER.OPTIMIZER_NAME": OPTIMIZERS,
}
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_POOLERS = ("ROIAlignV2", "ROIAlign", "ROIPool", "")  # "" in PointRend
# Keys of Detectron2, for which a project may have further values.
_DETECTRON2_CHOICES = {
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler", "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.FPN.NORM": _NORMS,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.RETINANET.NORM": _NORMS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.NORM": _NORMS,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": (*_POOLERS, "ROIAlignRotated"),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.NORM": _NORMS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.SEM_SEG_HEAD.NORM": _NORMS,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}  # fmt: skip
# Keys that samplers of Detectron2 read and that its config does not have; a project adds them.
_SAMPLER_KEYS = {
    "RandomSubsetTrainingSampler": ("DATALOADER", "RANDOM_SUBSET_RATIO"),
    "WeightedTrainingSampler": ("DATASETS", "TRAIN_REPEAT_FACTOR"),
    "WeightedCategoryTrainingSampler": ("DATASETS", "TRAIN_REPEAT_FACTOR"),
}
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
    check_types(cfg)
    check_intervals(cfg, unused)
    for key, choices in (_CHOICES if extended else {**_DETECTRON2_CHOICES, **_CHOICES}).items():
        if get_value(cfg, key) not in choices and not key.startswith(unused):
            raise invalid(key, get_value(cfg, key), f"one of {', '.join(choice or repr(choice) for choice in choices)}")
    device = _validate_device(cfg)
    _validate_compiled_operators(cfg)
    _validate_detector(cfg, extended)
    if not train:
        return
    lsj, paste, amp, solver = cfg.INPUT.LSJ, cfg.INPUT.COPY_PASTE, cfg.SOLVER.AMP, cfg.SOLVER
    repeats = cfg.DATALOADER.SAMPLER_TRAIN.startswith(("RepeatFactor", "WeightedCategory"))
    no_compiler = device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "gcc", "clang++")))
    no_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    reference = solver.REFERENCE_WORLD_SIZE
    cosine = solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    for wrong, key, expected in (
        (not cfg.INPUT.MIN_SIZE_TRAIN, "INPUT.MIN_SIZE_TRAIN", "at least one size"),
        (repeats and not cfg.DATALOADER.REPEAT_THRESHOLD, "DATALOADER.REPEAT_THRESHOLD", "more than 0, such as 0.001"),
        (lsj.MIN_SCALE > lsj.MAX_SCALE, "INPUT.LSJ.MIN_SCALE", f"at most INPUT.LSJ.MAX_SCALE={lsj.MAX_SCALE}"),
        (lsj.ENABLED and cfg.INPUT.CROP.ENABLED, "INPUT.CROP.ENABLED", "False with INPUT.LSJ.ENABLED"),
        (paste.ENABLED and not cfg.MODEL.MASK_ON, "MODEL.MASK_ON", "True with INPUT.COPY_PASTE.ENABLED"),
        (paste.ENABLED and cfg.MODEL.KEYPOINT_ON, "MODEL.KEYPOINT_ON", "False with INPUT.COPY_PASTE.ENABLED"),
        (amp.ENABLED and amp.PRECISION == "fp16" and device.type == "cpu", "SOLVER.AMP.PRECISION", "bf16 on the CPU"),
        (amp.ENABLED and amp.PRECISION == "bf16" and no_bf16, "SOLVER.AMP.PRECISION", "fp16 on this GPU"),
        (solver.NESTEROV and not solver.MOMENTUM, "SOLVER.MOMENTUM", "more than 0 with SOLVER.NESTEROV"),
        (cosine and solver.BASE_LR_END > solver.BASE_LR, "SOLVER.BASE_LR_END", f"at most BASE_LR={solver.BASE_LR}"),
        (reference and solver.IMS_PER_BATCH % reference, "SOLVER.REFERENCE_WORLD_SIZE", "a divisor of IMS_PER_BATCH"),
        (list(solver.STEPS) != sorted(solver.STEPS), "SOLVER.STEPS", "increasing iterations"),
        (cfg.MODEL.COMPILE and no_compiler, "MODEL.COMPILE", "False without a C++ compiler (g++) on the PATH"),
        (cfg.WANDB.ENABLED and not _installed("wandb"), "WANDB.ENABLED", "False without wandb (pip install wandb)"),
    ):
        if wrong:
            raise invalid(key, get_value(cfg, key), expected)
    if not extended:
        _validate_input(cfg)
    if cfg.SOLVER.LR_SCHEDULER_NAME in _DETECTRON2_CHOICES["SOLVER.LR_SCHEDULER_NAME"]:
        _validate_schedule(cfg)


def _validate_detector(cfg: CfgNode, extended: bool) -> None:
    """Check the lengths of sequences, which Detectron2 asserts without a message or finds in the first iteration."""
    model = cfg.MODEL
    for node in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = model[node].IOU_THRESHOLDS, model[node].IOU_LABELS
        if not thresholds or list(thresholds) != sorted(thresholds):
            raise invalid(f"MODEL.{node}.IOU_THRESHOLDS", thresholds, "increasing numbers")
        if len(labels) != len(thresholds) + 1:
            expected = f"{len(thresholds) + 1} labels, one more than IOU_THRESHOLDS"
            raise invalid(f"MODEL.{node}.IOU_LABELS", labels, expected)
    if extended:
        return
    rotated, cascade = model.ROI_HEADS.NAME == "RROIHeads", model.ROI_BOX_CASCADE_HEAD
    if (model.ROI_BOX_HEAD.POOLER_TYPE == "ROIAlignRotated") != rotated:
        expected = f"{'ROIAlignRotated' if rotated else 'ROIAlignV2'} with MODEL.ROI_HEADS.NAME={model.ROI_HEADS.NAME}"
        raise invalid("MODEL.ROI_BOX_HEAD.POOLER_TYPE", model.ROI_BOX_HEAD.POOLER_TYPE, expected)
    for key, length, meaning in (
        ("MODEL.PIXEL_MEAN", 3, "channel of the image"),
        ("MODEL.PIXEL_STD", 3, "channel of the image"),
        ("MODEL.RETINANET.BBOX_REG_WEIGHTS", 4, "parameter of a box"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", 5 if rotated else 4, "parameter of a box"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", 5 if model.PROPOSAL_GENERATOR.NAME == "RRPN" else 4, "parameter of a box"),
        ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", len(cascade.IOUS), "entry of IOUS"),
    ):
        if len(get_value(cfg, key)) != length:
            raise invalid(key, get_value(cfg, key), f"{length} values, one for each {meaning}")
    combined = model.META_ARCHITECTURE == "PanopticFPN" and model.PANOPTIC_FPN.COMBINE.ENABLED
    if combined and not model.MASK_ON:
        raise invalid("MODEL.MASK_ON", False, "True with MODEL.PANOPTIC_FPN.COMBINE.ENABLED")
    if any(len(weights) != 4 for weights in cascade.BBOX_REG_WEIGHTS):
        raise invalid("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", cascade.BBOX_REG_WEIGHTS, "tuples of 4 numbers")


def _validate_input(cfg: CfgNode) -> None:
    """Check what Detectron2's samplers and augmentations read."""
    sampler, sizes, crop = cfg.DATALOADER.SAMPLER_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP
    node, key = _SAMPLER_KEYS.get(sampler, ("DATALOADER", "SAMPLER_TRAIN"))
    if key not in cfg[node]:
        raise invalid("DATALOADER.SAMPLER_TRAIN", sampler, f"TrainingSampler, as the config has no {node}.{key}")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        raise invalid("INPUT.MIN_SIZE_TRAIN", sizes, "a minimum and a maximum with INPUT.MIN_SIZE_TRAIN_SAMPLING=range")
    if crop.TYPE.startswith("relative"):
        valid, expected = all(0 < size <= 1 for size in crop.SIZE), "numbers in (0, 1]"
    else:
        valid, expected = all(isinstance(size, int) and size > 0 for size in crop.SIZE), "integers above 0"
    if crop.TYPE == "absolute_range":
        valid, expected = valid and list(crop.SIZE) == sorted(crop.SIZE), f"{expected}, a minimum and a maximum"
    if crop.ENABLED and not (valid and len(crop.SIZE) == 2):
        raise invalid("INPUT.CROP.SIZE", crop.SIZE, f"2 {expected} with INPUT.CROP.TYPE={crop.TYPE}")


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
        raise invalid("MODEL.DEVICE", cfg.MODEL.DEVICE, "cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).cpu()
        except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
            raise invalid("MODEL.DEVICE", cfg.MODEL.DEVICE, "a device of this machine, such as cpu") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise invalid("MODEL.DEVICE", cfg.MODEL.DEVICE, f"an index below {torch.cuda.device_count()}")
    for key in ("MODEL.HALONET.BACKEND", "MODEL.HALODET_TIMM.BACKEND"):
        reason = triton_unavailable_reason(device) if get_value(cfg, key) == "triton" else None
        if reason:
            raise invalid(key, "triton", f"auto ({reason})")
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
            raise invalid(key, get_value(cfg, key), "a detectron2 with compiled operators") from error


def _validate_schedule(cfg: CfgNode) -> None:
    try:
        cfg = scale_to_batch(cfg, log=False)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR))
    except (ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"The learning rate schedule of SOLVER is invalid: {one_line(error)}.") from error


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder "wandb" of runs is a package without files
