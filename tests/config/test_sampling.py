"""Random configs: each is rejected with a message that names its keys, or trains and is evaluated.

HALODET_SAMPLED_CONFIGS=200 pytest tests/config/test_sampling.py checks 200 of them instead of the default number.
"""

import os
import re
import shutil

from halodet.config.keys import leaf_values
from halodet.data import register_shape_layouts
from halodet.data.synthetic_shapes import NUM_IMAGES
from halodet.engine import main
from halodet.errors import HalodetError

import numpy as np
import pytest
from conftest import restore_process
from detectron2.data import MetadataCatalog
from helpers import cached_config

COUNT = int(os.environ.get("HALODET_SAMPLED_CONFIGS", "25"))
KEYPOINTS = [
    "DATASETS.TRAIN", "('halodet_shapes_keypoints_train',)", "DATASETS.TEST", "('halodet_shapes_keypoints_val',)",
]  # fmt: skip
TINY = [
    "MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)", "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.HALONET.STEM_CHANNELS", "16",
    "MODEL.FPN.OUT_CHANNELS", "64", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "0.001",
    "TEST.DETECTIONS_PER_IMAGE", "5", "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.PRECISE_BN.NUM_ITER", "1",
]  # fmt: skip
RETINANET = [
    *KEYPOINTS, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", "False",
    "MODEL.BACKBONE.NAME", "build_retinanet_halonet_fpn_backbone", "MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']",
    "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.RETINANET.NUM_CLASSES", "6",
]  # fmt: skip
CASCADE = [*KEYPOINTS, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
TIMM = [*KEYPOINTS, "MODEL.BACKBONE.NAME", "build_halodet_timm_fpn_backbone", "MODEL.HALODET_TIMM.NAME", "halonet26t"]
ARCHITECTURES = {
    "mask": ("quick/mask_rcnn_halo_shapes", KEYPOINTS),
    "faster": ("quick/mask_rcnn_halo_shapes", [*KEYPOINTS, "MODEL.MASK_ON", "False"]),
    "cascade": ("quick/mask_rcnn_halo_shapes", CASCADE),
    "retinanet": ("quick/mask_rcnn_halo_shapes", RETINANET),
    "timm": ("quick/mask_rcnn_halo_shapes", TIMM),
    "keypoint": ("quick/keypoint_rcnn_halo_shapes", []),
    "panoptic": ("quick/panoptic_fpn_halo_shapes", []),
    "semantic": ("quick/semantic_fpn_halo_shapes", []),
}
# Likely values of keys: valid ones, and mistakes that the generic ones below do not contain.
VALUES = {
    "DATALOADER.SAMPLER_TRAIN": ["RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler",
                                 "WeightedTrainingSampler", "WeightedCategoryTrainingSampler"],
    "DATALOADER.NUM_WORKERS": [0],
    "DATASETS.TEST": [(), ("coco_2017_val",), ("nowhere",)],
    "INPUT.CROP.ENABLED": [True],
    "INPUT.CROP.SIZE": [[0.5, 0.5], [32, 48], [48, 32], [1.0, 1.0], [0.0, 0.5], [64.0, 64.0], [0.5]],
    "INPUT.CROP.TYPE": ["relative", "absolute", "absolute_range"],
    "INPUT.FORMAT": ["RGB", "L"],
    "INPUT.LSJ.SIZE": [64],
    "INPUT.MASK_FORMAT": ["polygon"],
    "INPUT.MAX_SIZE_TRAIN": [100],
    "INPUT.MIN_SIZE_TRAIN": [(48, 64), (32, 48, 64)],
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ["range"],
    "INPUT.RANDOM_FLIP": ["none", "vertical"],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[[1.0]], [[0.5, 1.0]] * 5, [[0.5, 1.0]] * 2, [[0]], [1.0]],
    "MODEL.ANCHOR_GENERATOR.NAME": ["RotatedAnchorGenerator"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[[16, 32]] * 5, [[32]], [[32]] * 4, [32], [[]]],
    "MODEL.BACKBONE.FREEZE_AT": [0, 1, 2, 5, 6],
    "MODEL.BACKBONE.NAME": ["build_halonet_backbone", "build_resnet_fpn_backbone", "build_halonet_fpn_backbone",
                            "build_retinanet_halonet_fpn_backbone"],
    "MODEL.DEVICE": ["mps", "cuda", "cuda:7", "xpu", "meta", "cpu:0", "cpu:3"],
    "MODEL.FPN.FUSE_TYPE": ["avg"],
    "MODEL.FPN.IN_FEATURES": [["res4", "res5"], ["res5", "res4"], ["res2", "res4"], ["p2"]],
    "MODEL.FPN.NORM": ["BN", "GN", "LN", "SyncBN"],
    "MODEL.HALODET_TIMM.NAME": ["resnet50", "botnet26t_256"],
    "MODEL.HALONET.ACTIVATION": ["relu", "silu"],
    "MODEL.HALONET.BACKEND": ["blocked", "unfold", "reference", "triton"],
    "MODEL.HALONET.BASE_WIDTH": [8, 16, 24.0, 10],
    "MODEL.HALONET.BLOCK_SIZE": [4, 7, 8.0, 2.5, (8, 8), 0],
    "MODEL.HALONET.BORDER": ["mask", "zero"],
    "MODEL.HALONET.BOTTLENECK_RATIO": [1.0, 2, 0.3, 0.0],
    "MODEL.HALONET.DEPTHS": [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1), (1.0, 1.0, 1.0, 1.0), 1, (0, 1, 1, 1)],
    "MODEL.HALONET.DROP_PATH_RATE": [0.2, 0.99],
    "MODEL.HALONET.HALO_SIZE": [0, 1, 2, 1.0, 1.5, -1],
    "MODEL.HALONET.MIXERS": [("halo",) * 4, ("conv",) * 4, ("conv", "conv", ("conv", "halo"), "botnet"), "halo",
                             ("conv", "conv", "conv", "none")],
    "MODEL.HALONET.NORM": ["BN", "FrozenBN", "GN", "SyncBN", "LN"],
    "MODEL.HALONET.NUM_HEADS": [(1, 2, 4, 8), (4, 4, 4, 4), (3, 3, 3, 3), (4.0, 8.0, 8.0, 8.0), 4],
    "MODEL.HALONET.OUT_FEATURES": [["res3", "res4", "res5"], ["res5"], ["res6"]],
    "MODEL.HALONET.OUTPUT_STRIDE": [8, 16, 64],
    "MODEL.HALONET.SE_RATIO": [0.0, 0.25, 1, 3.0],
    "MODEL.HALONET.STEM_CHANNELS": [16, 32, 16.0],
    "MODEL.HALONET.USE_ACT_CHECKPOINT": [["res2", "res5"], ["stem"]],
    "MODEL.HALONET.VALUE_RATIO": [1.0, 2.0, 0.5, 1],
    "MODEL.HALONET.VARIANT": ["H0", "R50-SE", "H8"],
    "MODEL.KEYPOINT_ON": [True],
    "MODEL.META_ARCHITECTURE": ["ProposalNetwork", "RetinaNet", "FCOS", "PanopticFPN", "SemanticSegmentor"],
    "MODEL.PIXEL_MEAN": [[100.0, 100.0, 100.0], [0, 0, 0], [100.0], [100.0] * 4],
    "MODEL.PIXEL_STD": [[50.0, 50.0, 50.0], [0.0, 1.0, 1.0], [1.0], [1.0] * 4],
    "MODEL.PROPOSAL_GENERATOR.NAME": ["RRPN", "PrecomputedProposals"],
    "MODEL.RETINANET.IN_FEATURES": [["p3", "p4"], ["p2", "p3", "p4", "p5", "p6"]],
    "MODEL.ROI_HEADS.IN_FEATURES": [["p2"], ["p3", "p4", "p5"], ["p2", "p4"], ["p2", "p3", "p4", "p5", "p6"]],
    "MODEL.ROI_HEADS.NAME": ["Res5ROIHeads", "CascadeROIHeads", "RROIHeads"],
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ["giou", "diou", "ciou"],
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ["ROIPool", "ROIAlign", "ROIAlignRotated"],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ["giou", "diou", "ciou"],
    "MODEL.RPN.BOUNDARY_THRESH": [0],
    "MODEL.RPN.CONV_DIMS": [[-1, -1], [32], [16, 32]],
    "MODEL.RPN.IN_FEATURES": [["p2", "p3", "p4", "p5"], ["p4"], ["res4"]],
    "MODEL.RPN.IOU_THRESHOLDS": [[0.3], [0.5, 0.5], [0.7, 0.3]],
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": [["p2", "p3"], ["p3", "p4", "p5"]],
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": [4, 8, 2],
    "MODEL.TF32": [True, "yes"],
    "SOLVER.AMP.PRECISION": ["fp16"],
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ["value", "full_model"],
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": [float("inf"), 1.0],
    "SOLVER.IMS_PER_BATCH": [0, 1, 4],
    "SOLVER.LR_SCHEDULER_NAME": ["WarmupMultiStepLR", "WarmupStepWithFixedGammaLR"],
    "SOLVER.OPTIMIZER_NAME": ["SGD"],
    "SOLVER.STEPS": [(1,), (1, 5), (2, 1), (1, 1)],
    "SOLVER.WARMUP_METHOD": ["constant", "cosine"],
    "TEST.AUG.ENABLED": [True],
    "TEST.AUG.MIN_SIZES": [(48,), (5000,)],
    "TEST.EXPECTED_RESULTS": [[["bbox", "AP", 50.0, 100.0]], [["bbox", "AP"]], ["bbox"], [["segm", "PQ", 1.0, 1.0]],
                              [["nothing", "AP", 1.0, 1.0]]],
    "TEST.KEYPOINT_OKS_SIGMAS": [[0.1] * 4, [0.1] * 17, [0.0] * 4, [0.1]],
    "TEST.PRECISE_BN.ENABLED": [True],
    "TEST.EVAL_PERIOD": [1, 2],
    "TEST.VIS_PERIOD": [1],
}  # fmt: skip
# Without effect on the run, or set by the test; or (MODEL.COMPILE) slow.
FIXED = ("DATASETS.TRAIN", "MODEL.COMPILE", "MODEL.WEIGHTS", "OUTPUT_DIR", "SOLVER.MAX_ITER", "VERSION", "WANDB.")
# Of these a large value needs no memory.
UNBOUNDED = ("_TOPK", "BATCH_SIZE_PER_IMAGE", "_PERIOD", "DETECTIONS_PER_IMAGE", "MAX_SIZE", "MAX_ITER", "SEED")


def draw_number(rng, value):
    """Return a number of the type of ``value``, rarely an extreme one or a value of another type."""
    whole = isinstance(value, int)
    numbers = [1, 2, 3, 8, value, value // 2, value + 1] if whole else [1.0, 0.5, 2.0, 1e-8, value, value / 2]
    extreme = [0, -1] if whole else [0.0, -1.0, 1e9, float("inf"), float("nan")]
    other = [float(value), value + 0.5, "many", None, True] if whole else [int(value), "many", None, True]
    return choice(rng, (numbers, extreme, other)[rng.choice(3, p=(0.84, 0.08, 0.08))])


def draw_value(rng, key, value):
    """Return a value for a key, from :data:`VALUES` or by the type of its own value."""
    if key in VALUES and rng.random() < 0.7:
        return choice(rng, VALUES[key])
    if rng.random() < 0.03:
        return choice(rng, [None, "nothing", [], (), -1, 1.5, True, {}])
    if isinstance(value, bool):
        return choice(rng, [None, 1, "True"]) if rng.random() < 0.1 else not value
    if isinstance(value, (int, float)):
        large = isinstance(value, int) and key.endswith(UNBOUNDED) and rng.random() < 0.2
        return 10**6 if large else draw_number(rng, value)
    if isinstance(value, (list, tuple)):
        items, change = list(value), rng.integers(5)
        if change == 0:
            items = items[:-1]
        elif change == 1:
            items += items[-1:] or ["nothing"]
        elif items:
            position = rng.integers(len(items))
            items[position] = draw_value(rng, "", items[position])
        return type(value)(items)
    return choice(rng, ["nothing", "", value]) if isinstance(value, str) else value


def choice(rng, values):
    return values[rng.integers(len(values))]


def draw_config(seed):
    """Return the name of an architecture, and one to four changed keys with their values."""
    rng = np.random.default_rng(seed)
    name = list(ARCHITECTURES)[seed % len(ARCHITECTURES)]
    config, opts = ARCHITECTURES[name]
    values = leaf_values(cached_config(config, *TINY, *opts))
    keys = sorted(key for key in values if not key.startswith(FIXED) and used(name, key))
    if rng.random() < 0.3:
        keys = [key for key in keys if key in VALUES]
    changed = rng.choice(keys, size=rng.integers(1, 5), replace=False).tolist()
    return name, {key: draw_value(rng, key, values[key]) for key in changed}


def used(name, key):
    """Return whether an architecture uses a key."""
    unused = {
        "MODEL.HALODET_TIMM.": name != "timm", "MODEL.HALONET.": name == "timm", "MODEL.RESNETS.": True,
        "MODEL.RETINANET.": name != "retinanet", "MODEL.RPN.": name in ("retinanet", "semantic"),
        "MODEL.ROI_": name in ("retinanet", "semantic"), "MODEL.ROI_MASK_": name in ("faster", "keypoint"),
        "MODEL.ROI_KEYPOINT_": name != "keypoint", "MODEL.SEM_SEG_HEAD.": name not in ("panoptic", "semantic"),
        "MODEL.PANOPTIC_FPN.": name != "panoptic", "MODEL.ROI_BOX_CASCADE_HEAD.": name != "cascade",
    }  # fmt: skip
    return not any(key.startswith(prefix) for prefix, without in unused.items() if without)


def run(seed, folder):
    """Do what tools/train_net.py does with a random config.

    Returns:
        The changed keys, and the message of the error; empty after training and evaluation.

    Raises:
        Exception: any but a HalodetError.
    """
    name, changed = draw_config(seed)
    config, opts = ARCHITECTURES[name]
    words = [word for key, value in changed.items() for word in (key, value if isinstance(value, str) else repr(value))]
    command = ["--config-file", config, "OUTPUT_DIR", str(folder), *TINY, *opts, *words]
    with restore_process():
        try:
            main.run_config(main.argument_parser("").parse_args(command))
        except HalodetError as error:
            return changed, str(error)
        except SystemExit:  # Detectron2's, if the metrics are not those of the key
            assert "TEST.EXPECTED_RESULTS" in changed
    return changed, ""


@pytest.fixture(scope="module", autouse=True)
def few_shapes(tmp_path_factory):
    """The datasets of the shapes with layouts, of four images."""
    usual = MetadataCatalog.get("halodet_shapes_keypoints_val").image_root.removesuffix("/val")
    with pytest.MonkeyPatch.context() as patch:
        for split in NUM_IMAGES:
            patch.setitem(NUM_IMAGES, split, 4)
        register_shape_layouts(tmp_path_factory.mktemp("few"))
        yield
        register_shape_layouts(usual)


def test_a_sampled_config_runs_or_is_rejected_with_its_keys(tmp_path):
    crashes, rejected, ran = [], [], 0
    for seed in range(COUNT):
        try:
            changed, message = run(seed, tmp_path / str(seed))
        except Exception as error:
            crashes.append(f"seed {seed}, {draw_config(seed)}: {type(error).__name__}: {error}")
            continue
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
        if message:
            rejected.append((changed, message))
        ran += not message
    print(f"{COUNT} configs: {ran} ran, {len(rejected)} were rejected, {len(crashes)} crashed")
    assert not crashes, "\n".join(crashes)
    assert ran >= 0.25 * COUNT and len(rejected) >= 0.25 * COUNT
    for changed, message in rejected:
        assert re.search(r"\b[A-Z]+\.[A-Z_]+|\bSEED=|VIS_PERIOD=|dataset '", message), (changed, message)
        assert "\n" not in message
    named = [any(key in m or (key.rpartition(".")[0] or key) in m for key in changed) for changed, m in rejected]
    assert sum(named) >= 0.75 * len(named)  # in others, the key is one that the changed one does not fit
