"""Config keys that halodet adds to Detectron2's defaults, and the directory of its config files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halodet.errors import ConfigError

from detectron2.config import CfgNode as CN


def add_halodet_config(cfg: CN) -> None:
    """Add halodet's keys and their default values to a Detectron2 config.

    Keys that exist keep their values: the function may be called before or after other projects' and more than once.

    Raises:
        ConfigError: another project has added one of the keys with a value of another type.
    """
    _add_missing(cfg, halodet_defaults())


def _add_missing(cfg: CN, defaults: CN, prefix: str = "") -> None:
    for key, default in defaults.items():
        if key not in cfg:
            setattr(cfg, key, default)
        elif isinstance(default, CN) and isinstance(cfg[key], CN):
            _add_missing(cfg[key], default, f"{prefix}{key}.")
        elif not _same_kind(cfg[key], default):
            raise ConfigError(
                f"{prefix}{key}={cfg[key]!r} is invalid: another project has added this key, halodet expects a value "
                f"like {default!r}. Fix: use the projects in separate configs."
            )


def _same_kind(value: Any, default: Any) -> bool:
    kinds = ((bool,), (int, float), (str,), (list, tuple), (CN,))
    return None in (value, default) or any(isinstance(value, k) and isinstance(default, k) for k in kinds)


def halodet_defaults() -> CN:
    """Return the keys that halodet adds, with their default values.

    The comment above a key is its entry in docs/config.md, which `python tools/config_reference.py` generates.
    """
    cfg = CN({name: CN() for name in ("MODEL", "INPUT", "DATALOADER", "SOLVER", "TEST")})
    cfg["SOLVER"]["AMP"] = CN()
    # HaloNet, built by build_halonet_backbone and its FPN variants.
    cfg.MODEL.HALONET = CN()
    # Network, a row of halodet/models/variants.py: H0 to H7, R50-SE, R50-SE-halo-b8h3, R101-SE and others.
    cfg.MODEL.HALONET.VARIANT = "H4"
    # Normalization layer: BN, FrozenBN, SyncBN or GN.
    cfg.MODEL.HALONET.NORM = "BN"
    # Feature maps to return: any of stem, res2, res3, res4, res5. Stages after the last one are not built.
    cfg.MODEL.HALONET.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Drop path rate of the last block, 0 to below 1. It increases linearly from 0 at the first block.
    cfg.MODEL.HALONET.DROP_PATH_RATE = 0.0
    # Attention backend: auto, triton (GPU), blocked (plain PyTorch), unfold (for export) or reference.
    cfg.MODEL.HALONET.BACKEND = "auto"
    # Stages with activation checkpointing, for example ["res2", "res3"]: less memory, more computation.
    cfg.MODEL.HALONET.USE_ACT_CHECKPOINT = []
    # Largest stride of the feature maps: 8, 16 (for DC5 and DeepLab heads) or 32. Later convolutions are dilated.
    cfg.MODEL.HALONET.OUTPUT_STRIDE = 32
    # Number of blocks in each of the four stages. None: the variant's.
    cfg.MODEL.HALONET.DEPTHS = None
    # Mixer of each stage (conv, halo or another registered one), or a list with one per block. None: the variant's.
    cfg.MODEL.HALONET.MIXERS = None
    # Side of an attention block in pixels. None: the variant's.
    cfg.MODEL.HALONET.BLOCK_SIZE = None
    # Width of the halo around a block in pixels. None: the variant's.
    cfg.MODEL.HALONET.HALO_SIZE = None
    # Options of mixers, a mapping by mixer name, for example {botnet: {window: 16}}. Each mixer checks its own.
    cfg.MODEL.HALONET.MIXER_OPTIONS = CN(new_allowed=True)
    # Value channels of attention as a multiple of the stage's width. None: the variant's.
    cfg.MODEL.HALONET.VALUE_RATIO = None
    # Output channels of a block as a multiple of the stage's width. None: the variant's.
    cfg.MODEL.HALONET.BOTTLENECK_RATIO = None
    # Number of attention heads in each of the four stages. None: the variant's.
    cfg.MODEL.HALONET.NUM_HEADS = None
    # Width of the first stage in channels; it doubles with every stage. None: the variant's.
    cfg.MODEL.HALONET.BASE_WIDTH = None
    # Number of stem channels. None: the variant's.
    cfg.MODEL.HALONET.STEM_CHANNELS = None
    # Hidden channels of squeeze-excitation as a fraction of a block's output channels; 0: none. None: the variant's.
    cfg.MODEL.HALONET.SE_RATIO = None
    # Activation function: relu or silu. None: the variant's.
    cfg.MODEL.HALONET.ACTIVATION = None
    # Keys outside the feature map: mask (excluded) or zero (zeros that take part, as in timm). None: the variant's.
    cfg.MODEL.HALONET.BORDER = None
    # Slots of external attention at the end of each of the four stages; 0: none there. None: the variant's.
    cfg.MODEL.HALONET.EXTERNAL_SLOTS = None

    # Attention networks of timm, built by build_halodet_timm_backbone and its FPN variants.
    cfg.MODEL.HALODET_TIMM = CN()
    # timm's model name, with the tag of its pretrained weights.
    cfg.MODEL.HALODET_TIMM.NAME = "halonet50ts.a1h_in1k"
    # Normalization layer: FrozenBN, BN or SyncBN.
    cfg.MODEL.HALODET_TIMM.NORM = "FrozenBN"
    # Feature maps to return: any of res2, res3, res4, res5.
    cfg.MODEL.HALODET_TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Drop path rate of the last block, 0 to below 1. It increases linearly from 0 at the first block.
    cfg.MODEL.HALODET_TIMM.DROP_PATH_RATE = 0.0
    # Window of bottleneck (global) attention in pixels of its feature map; 0: the whole map.
    cfg.MODEL.HALODET_TIMM.WINDOW_SIZE = 0
    # Relative position tables of bottleneck attention at other map sizes: interpolate, or offset (true pixel offsets).
    cfg.MODEL.HALODET_TIMM.REL_POS_MODE = "interpolate"
    # Attention backend, as MODEL.HALONET.BACKEND.
    cfg.MODEL.HALODET_TIMM.BACKEND = "auto"
    # Stages with activation checkpointing, as MODEL.HALONET.USE_ACT_CHECKPOINT.
    cfg.MODEL.HALODET_TIMM.USE_ACT_CHECKPOINT = []
    # Require INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD to be those of the pretrained weights.
    cfg.MODEL.HALODET_TIMM.CHECK_PREPROCESSING = True

    # Minimum fraction, 0 to 1, of the expected tensors and parameters that MODEL.WEIGHTS must load.
    cfg.MODEL.WEIGHTS_MIN_LOADED = 0.95

    # Exponential moving average of the weights.
    cfg.MODEL.EMA = CN()
    # Keep the average, evaluate it as ema/bbox/AP and save it as model_final_ema.pth.
    cfg.MODEL.EMA.ENABLED = False
    # Decay per iteration, 0 to below 1; warmed up as (1 + t) / (10 + t).
    cfg.MODEL.EMA.DECAY = 0.9999

    # TF32 for float32 matrix products and convolutions on GPUs: True, False, or None for PyTorch's default.
    cfg.MODEL.TF32 = None
    # Keep the backbone's weights and feature maps in channels-last memory format.
    cfg.MODEL.CHANNELS_LAST = False
    # Compile the backbone with torch.compile.
    cfg.MODEL.COMPILE = False

    # Large-scale jitter; replaces the resizing of INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.LSJ = CN()
    # Use large-scale jitter.
    cfg.INPUT.LSJ.ENABLED = False
    # Minimum scale, relative to the square of INPUT.LSJ.SIZE.
    cfg.INPUT.LSJ.MIN_SCALE = 0.1
    # Maximum scale, relative to the square of INPUT.LSJ.SIZE.
    cfg.INPUT.LSJ.MAX_SCALE = 2.0
    # Side in pixels of the square that is cropped or padded to.
    cfg.INPUT.LSJ.SIZE = 1024

    # Copy-paste augmentation: objects of another image of the dataset are pasted. Requires masks.
    cfg.INPUT.COPY_PASTE = CN()
    # Use copy-paste.
    cfg.INPUT.COPY_PASTE.ENABLED = False
    # Probability, 0 to 1, that an image receives objects.
    cfg.INPUT.COPY_PASTE.PROBABILITY = 1.0

    # Maximum fraction, 0 to 1, of unusable images among the images seen; checked from 10 unusable images on.
    cfg.DATALOADER.MAX_BAD_IMAGES = 0.05

    # Optimizer: SGD or AdamW.
    cfg.SOLVER.OPTIMIZER_NAME = "SGD"
    # Precision of SOLVER.AMP.ENABLED: bf16, or fp16 with gradient scaling.
    cfg.SOLVER.AMP.PRECISION = "bf16"
    # Number of batches of SOLVER.IMS_PER_BATCH images whose gradients are averaged for one optimizer step.
    cfg.SOLVER.GRAD_ACCUM_STEPS = 1
    # Action on non-finite losses or gradients: stop, or skip (drop the step).
    cfg.SOLVER.NON_FINITE_POLICY = "stop"
    # Maximum number of dropped steps before training stops.
    cfg.SOLVER.NON_FINITE_MAX_STEPS = 3
    # Batch size that BASE_LR and the schedule are defined for; both are scaled to IMS_PER_BATCH. 0: no scaling.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # Learning rate multiplier of the bottom-up network; FPN and heads use BASE_LR.
    cfg.SOLVER.BACKBONE_LR_MULTIPLIER = 1.0
    # Layer-wise learning rate decay from the last block back to the stem, as in timm and ViTDet; 1: none.
    cfg.SOLVER.LR_LAYER_DECAY = 1.0
    # Weight decay of relative position tables.
    cfg.SOLVER.WEIGHT_DECAY_REL_POS = 0.0
    # Number of recent checkpoints to keep, besides model_final.pth; 0: all.
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0

    # Period in iterations of prediction images in TensorBoard; 0: none.
    cfg.TEST.VIS_PERIOD = 0
    # Number of images of the first dataset of DATASETS.TEST to draw.
    cfg.TEST.VIS_IMAGES = 4

    # Weights & Biases.
    cfg.WANDB = CN()
    # Send what is written to TensorBoard to Weights & Biases too. Requires wandb.
    cfg.WANDB.ENABLED = False
    # Project name.
    cfg.WANDB.PROJECT = "halodet"
    return cfg


def config_dir() -> Path:
    """Return the directory of halodet's config files, in an installed package or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
