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
    node.DROP_PATH_RATE = 0.0  # probability of dropping the last block's branch while training, rising linearly from 0
    node.BACKEND = "auto"  # what computes attention: auto, or triton, blocked, unfolded, reference (halodet/attention)
    node.USE_ACT_CHECKPOINT = []  # stages (["res2", "res3"]) computed again in the backward pass: less memory, more time
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
    node.BORDER = (
        None  # mask: attention leaves out what lies outside the map; zero: it sees zeros there (as timm's weights want)
    )

    node = cfg.MODEL.TIMM = CfgNode()  # of build_timm_backbone and its FPN forms
    node.NAME = "halonet50ts.a1h_in1k"  # timm's name of a network with attention, with the tag of its weights
    node.NORM = "FrozenBN"  # FrozenBN, BN or SyncBN
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]  # maps the backbone returns
    node.DROP_PATH_RATE = 0.0  # probability of dropping the last block's branch while training, rising linearly from 0
    node.WINDOW_SIZE = 0  # bottleneck (global) attention: pixels of its map along a side of the windows it stays in; 0 for the whole map
    node.REL_POS_MODE = (
        "interpolate"  # how bottleneck attention reads its tables at other sizes: interpolate, or offset (in pixels)
    )
    node.BACKEND = "auto"  # as MODEL.HALONET.BACKEND
    node.USE_ACT_CHECKPOINT = []  # as MODEL.HALONET.USE_ACT_CHECKPOINT
    node.CHECK_PREPROCESSING = True  # INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD must be those the weights were trained with; False: as they are given

    cfg.MODEL.WEIGHTS_MIN_LOADED = (
        0.95  # share of what MODEL.WEIGHTS should fill (its kind decides) below which training does not start
    )

    node = cfg.INPUT.LSJ = CfgNode()  # large-scale jitter instead of INPUT.MIN_SIZE_TRAIN and its like
    node.ENABLED = False
    node.MIN_SCALE = 0.1  # of the square an image is scaled into
    node.MAX_SCALE = 2.0
    node.SIZE = 1024  # pixels along a side of the square that is cut out or padded to

    node = cfg.INPUT.COPY_PASTE = CfgNode()  # objects of another image of the dataset laid on an image; needs masks
    node.ENABLED = False
    node.PROBABILITY = 1.0  # share of images that get objects pasted

    cfg.DATALOADER.MAX_BAD_IMAGES = (
        0.05  # share of images seen that may be unusable before training stops; from 10 of them on
    )

    node = cfg.MODEL.EMA = CfgNode()
    node.ENABLED = False  # keep a moving average of the weights: evaluated as ema/bbox/AP, saved as model_final_ema.pth
    node.DECAY = 0.9999  # share of the average that stays at each iteration; less in the first ones: (1 + t) / (10 + t)

    cfg.MODEL.TF32 = (
        None  # whether GPUs may multiply float32 in TF32: True, False, or None for PyTorch's own (convolutions only)
    )
    cfg.MODEL.CHANNELS_LAST = (
        False  # the backbone's weights and maps with channels last, which tensor cores like; maps on the CPU have it
    )
    cfg.MODEL.COMPILE = False  # torch.compile of the backbone

    cfg.SOLVER.AMP.PRECISION = "bf16"  # what SOLVER.AMP.ENABLED computes in: bf16, or fp16 with scaled gradients
    cfg.SOLVER.GRAD_ACCUM_STEPS = (
        1  # batches of IMS_PER_BATCH images whose losses and gradients are averaged for one iteration
    )
    cfg.SOLVER.NON_FINITE_POLICY = (
        "stop"  # on NaN or infinite losses or gradients: stop, skip (drop the step), or rollback (last checkpoint)
    )
    cfg.SOLVER.NON_FINITE_MAX_STEPS = 3  # how often a step is dropped, or the run goes back, before it stops
    cfg.SOLVER.OPTIMIZER = "SGD"  # SGD or AdamW
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = (
        0  # images in a batch that BASE_LR and the schedule are for: both are scaled to IMS_PER_BATCH; 0: as given
    )
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0  # rate of the bottom-up network over BASE_LR, which the FPN and the heads have
    cfg.SOLVER.LR_LAYER_DECAY = (
        1.0  # a further factor for each block, from the last one back to the stem, as in timm and ViTDet; 1.0: none
    )
    cfg.SOLVER.WEIGHT_DECAY_REL_POS = 0.0  # weight decay of tables of relative positions (height_rel, width_rel)
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0  # how many checkpoints stay, the newest ones, model_final.pth besides; 0: all

    cfg.TEST.VIS_PERIOD = 0  # iterations between drawings of predictions for TensorBoard; 0: none
    cfg.TEST.VIS_IMAGES = 4  # how many images of the first dataset of DATASETS.TEST are drawn

    cfg.WANDB = CfgNode()
    cfg.WANDB.ENABLED = False  # send what TensorBoard gets to Weights & Biases too; needs wandb
    cfg.WANDB.PROJECT = "halodet"


def config_dir() -> Path:
    """The folder of halodet's config files, in an installed package or in a checkout."""
    here = Path(__file__).resolve().parent.parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"
