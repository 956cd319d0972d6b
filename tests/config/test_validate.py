"""Config values: what is rejected, and what depends on the machine."""

import re
import sys

from halodet.config import load_config, validate
from halodet.config.intervals import _INTERVALS
from halodet.config.keys import default_values
from halodet.errors import ConfigError

import pytest
import torch

CPU = ["MODEL.DEVICE", "cpu"]


def rejected(cfg, *opts):
    """The message of the ConfigError that the overrides give."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(opts))
    with pytest.raises(ConfigError) as error:
        validate(cfg)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def cfg():
    return load_config("mask_rcnn_r50", CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.MAX_ITER", "-5"),
        ("SOLVER.STEPS", "(-3,)"),
        ("SOLVER.STEPS", "('a',)"),
        ("SOLVER.CHECKPOINT_PERIOD", "0"),
        ("SOLVER.CHECKPOINT_MAX_TO_KEEP", "-1"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "-1.0"),
        ("SOLVER.WEIGHT_DECAY_REL_POS", "-1.0"),
        ("SOLVER.BASE_LR", "1e999"),
        ("SOLVER.BACKBONE_LR_MULTIPLIER", "0.0"),
        ("SOLVER.LR_LAYER_DECAY", "1.5"),
        ("SOLVER.GRAD_ACCUM_STEPS", "0"),
        ("SOLVER.GRAD_ACCUM_STEPS", "None"),
        ("SOLVER.BASE_LR", "None"),
        ("SOLVER.BASE_LR", "0.0"),
        ("SOLVER.STEPS", "(20, 10)"),
        ("SOLVER.WARMUP_METHOD", "cosine"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "3"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.0"),
        ("SOLVER.NON_FINITE_POLICY", "ignore"),
        ("SOLVER.NON_FINITE_POLICY", "rollback"),
        ("SOLVER.NON_FINITE_MAX_STEPS", "-1"),
        ("SOLVER.OPTIMIZER_NAME", "Adam"),
        ("SOLVER.AMP.PRECISION", "float16"),
        ("SOLVER.REFERENCE_IMS_PER_BATCH", "-1"),
        ("DATALOADER.NUM_WORKERS", "-1"),
        ("DATALOADER.SAMPLER_TRAIN", "Sampler"),
        ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"),
        ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"),
        ("DATALOADER.MAX_BAD_IMAGES", "1.5"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
        ("INPUT.MASK_FORMAT", "rle"),
        ("INPUT.FORMAT", "GRAY"),
        ("INPUT.MIN_SIZE_TRAIN", "(64.0,)"),
        ("INPUT.MAX_SIZE_TEST", "0"),
        ("INPUT.LSJ.MIN_SCALE", "0.0"),
        ("INPUT.LSJ.MIN_SCALE", "3.0"),
        ("INPUT.LSJ.SIZE", "0"),
        ("INPUT.COPY_PASTE.PROBABILITY", "0.0"),
        ("MODEL.DEVICE", "gpu"),
        ("MODEL.DEVICE", "meta"),
        ("MODEL.DEVICE", "xpu"),
        ("MODEL.DEVICE", "None"),
        ("MODEL.TF32", "yes"),
        ("MODEL.PIXEL_MEAN", "[100.0]"),
        ("MODEL.PIXEL_STD", "[50.0, 50.0, 50.0, 50.0]"),
        ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"),
        ("MODEL.FPN.NORM", "BNN"),
        ("MODEL.FPN.OUT_CHANNELS", "0"),
        ("MODEL.HALONET.BLOCK_SIZE", "8.0"),
        ("MODEL.HALONET.BLOCK_SIZE", "0"),
        ("MODEL.HALONET.HALO_SIZE", "1.5"),
        ("MODEL.HALONET.HALO_SIZE", "True"),
        ("MODEL.HALONET.DEPTHS", "(1.0, 1.0, 1.0, 1.0)"),
        ("MODEL.HALONET.BASE_WIDTH", "wide"),
        ("MODEL.HALONET.DROP_PATH_RATE", "1.5"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[32, 64]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[]]"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 0.0]]"),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "0"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "l1"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0, 1.0)"),
        ("MODEL.RPN.IOU_LABELS", "[0, 1]"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]"),
        ("MODEL.RPN.PRE_NMS_TOPK_TEST", "None"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "0"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
        ("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 60.0, 0.7)"),
        ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "-1"),
        ("MODEL.EMA.DECAY", "1.0"),
        ("MODEL.WEIGHTS_MIN_LOADED", "95.0"),
        ("TEST.EVAL_PERIOD", "-1"),
        ("TEST.VIS_IMAGES", "-1"),
        ("SEED", "99999999999"),
    ],
)
def test_a_value_out_of_range_names_its_key(cfg, key, value):
    found = value.replace("1e999", "inf")
    assert f"{key}={found} is invalid: expected" in rejected(cfg, key, value)


@pytest.mark.parametrize(
    ("opts", "key"),
    [
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], "DATALOADER.REPEAT_THRESHOLD"),
        (["INPUT.LSJ.ENABLED", "True", "INPUT.CROP.ENABLED", "True"], "INPUT.CROP.ENABLED"),
        (["INPUT.COPY_PASTE.ENABLED", "True", "MODEL.MASK_ON", "False"], "MODEL.MASK_ON"),
        (["INPUT.COPY_PASTE.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", "False"], "MODEL.MASK_ON"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "fp16"], "SOLVER.AMP.PRECISION"),
        (
            ["SOLVER.REFERENCE_IMS_PER_BATCH", "16", "SOLVER.REFERENCE_WORLD_SIZE", "8"],
            "SOLVER.REFERENCE_IMS_PER_BATCH",
        ),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "Cosine"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", "1.0"], "SOLVER.BASE_LR_END=1.0"),
        (["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.0"], "SOLVER.MOMENTUM=0.0"),
        (["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"], "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"),
    ],
)
def test_values_that_exclude_each_other(cfg, opts, key):
    assert key in rejected(cfg, *opts)


@pytest.mark.parametrize(
    ("kind", "size", "valid"),
    [
        ("relative", "[0.5, 1.0]", True),
        ("relative", "[0.5, 1.5]", False),
        ("relative", "[0.5]", False),
        ("relative_range", "[1, 0.3]", True),
        ("relative_range", "[0.0, 0.3]", False),
        ("relative_range", "[300, 300]", False),
        ("absolute", "[300, 200]", True),
        ("absolute", "[300.0, 200.0]", False),
        ("absolute", "[0.9, 0.9]", False),
        ("absolute", "[0, 300]", False),
        ("absolute_range", "[200, 300]", True),
        ("absolute_range", "[300, 200]", False),
        ("absolute_range", "[200, 300, 400]", False),
    ],
)
def test_the_size_of_crops_depends_on_their_type(cfg, kind, size, valid):
    opts = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size]
    if valid:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(opts)
        validate(cfg)
    else:
        assert re.search(rf"INPUT.CROP.SIZE=.* expected 2 .* INPUT.CROP.TYPE={kind}", rejected(cfg, *opts))


def test_a_range_of_sizes_has_two_ends(cfg):
    opts = ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN"]
    for sizes in ("(640,)", "(800, 640)", "(640, 700, 800)"):
        assert "INPUT.MIN_SIZE_TRAIN=" in rejected(cfg, *opts, sizes)
    assert load_config("mask_rcnn_r50", [*CPU, *opts, "(640, 800)"]).INPUT.MIN_SIZE_TRAIN == (640, 800)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device mps")
def test_a_device_that_this_machine_does_not_have(cfg):
    with pytest.raises(ConfigError, match="^MODEL.DEVICE=mps is invalid: expected a device of this machine"):
        load_config("mask_rcnn_r50", ["MODEL.DEVICE", "mps"])


def test_a_project_may_have_further_values():
    def add_sampler(cfg):
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
        cfg.MODEL.MY_SIZES = [-1, None]

    subset = [*CPU, "DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"]
    cfg = load_config("mask_rcnn_r50", subset, add_configs=[add_sampler])
    validate(cfg)  # Detectron2's sampler reads the project's key
    own = [*CPU, "DATALOADER.SAMPLER_TRAIN", "OwnSampler", "MODEL.PIXEL_MEAN", "[1.0]", "MODEL.FPN.NORM", "OwnNorm"]
    assert load_config("mask_rcnn_r50", own, add_configs=[add_sampler]).DATALOADER.SAMPLER_TRAIN == "OwnSampler"
    with pytest.raises(ConfigError, match="^MODEL.FPN.OUT_CHANNELS=None is invalid"):
        load_config("mask_rcnn_r50", [*own, "MODEL.FPN.OUT_CHANNELS", "None"], add_configs=[add_sampler])


def test_every_interval_is_of_a_key():
    assert {key for keys in _INTERVALS.values() for key in keys} <= default_values().keys()


def test_None_is_what_it_is_by_default(cfg):
    for key in ("MODEL.HALONET.BLOCK_SIZE", "MODEL.TF32", "SOLVER.WEIGHT_DECAY_NORM"):
        assert load_config("mask_rcnn_r50", [*CPU, key, "None"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("MODEL.BACKBONE.FREEZE_AT", -1), ("VIS_PERIOD", -1), ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0),
     ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.1), ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", -1)],
)  # fmt: skip
def test_what_detectron2_accepts_is_accepted(key, value):
    assert load_config("mask_rcnn_r50", [*CPU, key, str(value)])


def test_bf16_needs_no_gpu(cfg):
    assert load_config("mask_rcnn_halo_h0", [*CPU, "SOLVER.AMP.ENABLED", "True"]).SOLVER.AMP.PRECISION == "bf16"


def test_what_is_not_installed(cfg, monkeypatch, tmp_path):
    monkeypatch.delattr("detectron2._C", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2._C", None)  # importing it fails, also where it is installed
    assert "MODEL.ROI_HEADS.NAME=RROIHeads" in rejected(cfg, "MODEL.ROI_HEADS.NAME", "RROIHeads")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "MODEL.COMPILE" in rejected(cfg, "MODEL.COMPILE", "True")
    module = validate.__globals__
    monkeypatch.setitem(module, "_installed", lambda package: False)
    assert "wandb" in rejected(cfg, "WANDB.ENABLED", "True")
    monkeypatch.setitem(module, "triton_unavailable_reason", lambda device: f"no Triton for {device}")
    assert re.search(
        "MODEL.HALONET.BACKEND=triton .*no Triton for cpu", rejected(cfg, "MODEL.HALONET.BACKEND", "triton")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_cpu_is_used(caplog):
    assert load_config("mask_rcnn_halo_h0").MODEL.DEVICE == "cpu"
    assert "MODEL.DEVICE=cpu" in caplog.text
