"""Check that the numbers of a config are in the interval of their key."""

from __future__ import annotations

from typing import Any

from halodet.config.keys import default_values, flatten, invalid, leaf_values

from detectron2.config import CfgNode

_DEFAULT = "[0, inf)"
# The intervals of the numbers in other keys. (0, inf] includes inf; NaN is in none.
_INTERVALS = {
    "[1, inf)": (
        "INPUT.LSJ.SIZE", "INPUT.MAX_SIZE_TEST", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN",
        "MODEL.FPN.OUT_CHANNELS",
        "MODEL.HALONET.BASE_WIDTH", "MODEL.HALONET.BLOCK_SIZE", "MODEL.HALONET.DEPTHS", "MODEL.HALONET.NUM_HEADS",
        "MODEL.HALONET.STEM_CHANNELS", "MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.RES2_OUT_CHANNELS",
        "MODEL.RESNETS.RES5_DILATION", "MODEL.RESNETS.STEM_OUT_CHANNELS", "MODEL.RESNETS.WIDTH_PER_GROUP",
        "MODEL.RETINANET.NUM_CLASSES", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "MODEL.ROI_BOX_HEAD.CONV_DIM",
        "MODEL.ROI_BOX_HEAD.FC_DIM", "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS",
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION",
        "MODEL.ROI_MASK_HEAD.CONV_DIM", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
        "MODEL.RPN.POST_NMS_TOPK_TEST", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "MODEL.RPN.PRE_NMS_TOPK_TEST",
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "MODEL.SEM_SEG_HEAD.CONVS_DIM",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.GRAD_ACCUM_STEPS", "SOLVER.IMS_PER_BATCH",
        "SOLVER.MAX_ITER", "SOLVER.NUM_DECAYS", "TEST.AUG.MAX_SIZE", "TEST.AUG.MIN_SIZES", "TEST.PRECISE_BN.NUM_ITER",
    ),
    "(0, inf)": (
        "INPUT.LSJ.MAX_SCALE", "INPUT.LSJ.MIN_SCALE", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
        "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.HALONET.BOTTLENECK_RATIO", "MODEL.HALONET.VALUE_RATIO",
        "MODEL.PIXEL_STD",
        "MODEL.RETINANET.BBOX_REG_WEIGHTS", "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "MODEL.RPN.BBOX_REG_WEIGHTS", "SOLVER.BACKBONE_LR_MULTIPLIER",
        "SOLVER.BASE_LR", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "TEST.KEYPOINT_OKS_SIGMAS",
    ),
    "(0, inf]": ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",),
    "[0, 1]": (
        "DATALOADER.MAX_BAD_IMAGES", "MODEL.HALONET.SE_RATIO", "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
        "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH", "MODEL.RETINANET.IOU_THRESHOLDS",

        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "MODEL.ROI_HEADS.IOU_THRESHOLDS",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION",
        "MODEL.RPN.IOU_THRESHOLDS", "MODEL.RPN.POSITIVE_FRACTION", "MODEL.WEIGHTS_MIN_LOADED",
    ),
    "(0, 1]": ("INPUT.COPY_PASTE.PROBABILITY", "SOLVER.LR_LAYER_DECAY"),
    "[0, 1)": (
        "MODEL.EMA.DECAY", "MODEL.HALODET_TIMM.DROP_PATH_RATE", "MODEL.HALONET.DROP_PATH_RATE", "SOLVER.MOMENTUM",
    ),
    "(0, 1)": ("MODEL.RETINANET.PRIOR_PROB",),
    "[-1, 1]": (
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA", "MODEL.RETINANET.IOU_LABELS", "MODEL.ROI_HEADS.IOU_LABELS",
        "MODEL.RPN.IOU_LABELS",
    ),
    "[-1, inf)": (  # -1: none, or all
        "MODEL.BACKBONE.FREEZE_AT", "MODEL.RPN.BOUNDARY_THRESH", "MODEL.RPN.CONV_DIMS",
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "TEST.DETECTIONS_PER_IMAGE", "VIS_PERIOD",
    ),
    "[-360, 360]": ("MODEL.ANCHOR_GENERATOR.ANGLES",),
    "(-inf, inf)": (
        "MODEL.PIXEL_MEAN", "MODEL.RETINANET.SCORE_THRESH_TEST", "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "TEST.EXPECTED_RESULTS",
    ),
    "[-inf, 2147483648)": ("SEED",),  # numpy accepts seeds below 2**32, and each rank adds to it
}  # fmt: skip


def check_intervals(cfg: CfgNode, unused: tuple[str, ...] = ()) -> None:
    """Check the numbers of Detectron2's and halodet's keys.

    Args:
        cfg: the config.
        unused: prefixes of keys that are not checked.

    Raises:
        ConfigError: a number is outside the interval of its key.
    """
    intervals = {key: interval for interval, keys in _INTERVALS.items() for key in keys}
    for key, value in leaf_values(cfg).items():
        if key in default_values() and not key.startswith(unused):
            interval = intervals.get(key, _DEFAULT)
            numbers = [number for number in flatten(value) if isinstance(number, (int, float))]
            if not all(_is_inside(number, interval) for number in numbers):
                raise invalid(key, value, f"{'a number' if numbers == [value] else 'numbers'} in {interval}")


def _is_inside(value: Any, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)
