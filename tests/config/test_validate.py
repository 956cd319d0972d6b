"""Config values: what is rejected, and what depends on the machine."""

import re
import sys

from halodet.config import load_config, validate
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
        ("SOLVER.NON_FINITE_POLICY", "ignore"),
        ("SOLVER.NON_FINITE_POLICY", "rollback"),
        ("SOLVER.NON_FINITE_MAX_STEPS", "-1"),
        ("SOLVER.OPTIMIZER_NAME", "Adam"),
        ("SOLVER.AMP.PRECISION", "float16"),
        ("SOLVER.REFERENCE_IMS_PER_BATCH", "-1"),
        ("DATALOADER.NUM_WORKERS", "-1"),
        ("DATALOADER.SAMPLER_TRAIN", "Sampler"),
        ("DATALOADER.MAX_BAD_IMAGES", "1.5"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
        ("INPUT.MASK_FORMAT", "rle"),
        ("INPUT.FORMAT", "GRAY"),
        ("INPUT.LSJ.MIN_SCALE", "0.0"),
        ("INPUT.LSJ.MIN_SCALE", "3.0"),
        ("INPUT.LSJ.SIZE", "0"),
        ("INPUT.COPY_PASTE.PROBABILITY", "0.0"),
        ("MODEL.DEVICE", "gpu"),
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
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "fp16"], "SOLVER.AMP.PRECISION"),
        (
            ["SOLVER.REFERENCE_IMS_PER_BATCH", "16", "SOLVER.REFERENCE_WORLD_SIZE", "8"],
            "SOLVER.REFERENCE_IMS_PER_BATCH",
        ),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "Cosine"),
    ],
)
def test_values_that_exclude_each_other(cfg, opts, key):
    assert key in rejected(cfg, *opts)


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
