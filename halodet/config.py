"""The config keys halodet adds to Detectron2's, and where its config files are."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode


def add_halodet_config(cfg: CfgNode) -> None:
    """Add halodet's keys, with their defaults, to a Detectron2 config."""
    node = cfg.MODEL.HALONET = CfgNode()
    node.VARIANT = "H4"  # a row of halodet/backbones/variants.py: H0 … H7, R50-SE, R50-SE-halo-b8h3, R50-SE-halo-b32h3, R101-SE, ...
    node.NORM = "BN"  # BN, FrozenBN, SyncBN or GN
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]  # maps the backbone returns; also stem
    node.STOCHASTIC_DEPTH = 0.0  # probability of dropping the last block's branch while training, rising linearly from 0
    node.BACKEND = "auto"  # what computes attention: auto, or triton, blocked, unfolded, reference (halodet/attention)
    # Each key below overrides one column of the variant's row; None keeps the row's value.
    node.DEPTHS = None  # blocks in each of the four stages
    node.MIXERS = None  # per stage "conv" or "halo", or a list with one name for each block
    node.BLOCK_SIZE = None  # pixels along a side of an attention block
    node.HALO_SIZE = None  # pixels around it that are also attended to
    node.VALUE_RATIO = None  # channels of attention's values over the stage's width
    node.BOTTLENECK_RATIO = None  # channels of a block's output over the stage's width
    node.NUM_HEADS = None  # attention heads in each of the four stages
    node.BASE_WIDTH = None  # width of the first stage; each further one doubles it
    node.STEM_CHANNELS = None  # channels of the stem
    node.SE_RATIO = None  # squeeze-excitation: hidden over output channels of a block; 0 for none
    node.ACTIVATION = None  # relu or silu
    node.BORDER = None  # mask: attention leaves out what lies outside the map; zero: it sees zeros there (as timm's weights want)

    node = cfg.MODEL.TIMM = CfgNode()  # of build_timm_backbone and its FPN forms
    node.NAME = "halonet50ts.a1h_in1k"  # timm's name of a network with attention, with the tag of its weights
    node.NORM = "FrozenBN"  # FrozenBN, BN or SyncBN
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]  # maps the backbone returns
    node.STOCHASTIC_DEPTH = 0.0  # probability of dropping the last block's branch while training, rising linearly from 0
    node.WINDOW = 0  # bottleneck (global) attention: pixels of its map along a side of the windows it stays in; 0 for the whole map
    node.POSITION = "interpolate"  # how bottleneck attention reads its tables at other sizes: interpolate, or offset (in pixels)
    node.BACKEND = "auto"  # as MODEL.HALONET.BACKEND
    node.CHECK_INPUT = True  # INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD must be those the weights were trained with; False: as they are given

    cfg.MODEL.WEIGHTS_MIN_FILLED = 0.95  # share of what MODEL.WEIGHTS should fill (its kind decides) below which training does not start

    cfg.SOLVER.OPTIMIZER = "SGD"  # SGD or AdamW
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0  # rate of the bottom-up network over BASE_LR, which the FPN and the heads have
    cfg.SOLVER.LAYER_DECAY = 1.0  # a further factor for each block, from the last one back to the stem, as in timm and ViTDet; 1.0: none
    cfg.SOLVER.WEIGHT_DECAY_REL_POS = 0.0  # weight decay of tables of relative positions (height_rel, width_rel)
    cfg.SOLVER.CHECKPOINT_KEEP = 0  # how many checkpoints stay, the newest ones, model_final.pth besides; 0: all


def config_dir() -> Path:
    """The folder of halodet's config files, in an installed package or in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"
