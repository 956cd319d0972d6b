"""The linear scaling rule: the schedule over the images seen keeps its shape."""

import logging

from halodet.config.load import load_config
from halodet.errors import ConfigError
from halodet.solver import scale_to_batch

import pytest
import torch
from detectron2.solver import build_lr_scheduler

KEYS = [
    "SOLVER.IMS_PER_BATCH", "4", "SOLVER.REFERENCE_IMS_PER_BATCH", "16", "SOLVER.BASE_LR", "0.02", "SOLVER.MAX_ITER",
    "900",
    "SOLVER.STEPS", "(600, 800)", "SOLVER.WARMUP_ITERS", "100", "SOLVER.CHECKPOINT_PERIOD", "50", "TEST.EVAL_PERIOD",
    "30",
    "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR",
]  # fmt: skip
SCALED = {
    "SOLVER.BASE_LR": 0.005, "SOLVER.MAX_ITER": 3600, "SOLVER.STEPS": (2400, 3200), "SOLVER.WARMUP_ITERS": 400,
    "SOLVER.CHECKPOINT_PERIOD": 200, "TEST.EVAL_PERIOD": 120, "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.REFERENCE_IMS_PER_BATCH": 4,
}  # fmt: skip


def load(*opts):
    return load_config("quick/mask_rcnn_halo_small", [*KEYS, *opts])


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def rates(cfg):
    """Return the learning rate of every iteration."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    schedule = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_lr_and_iterations_are_scaled_and_logged_in_one_line(caplog):
    caplog.set_level(logging.INFO)
    cfg = load()
    scaled = scale_to_batch(cfg)
    assert {key: value(scaled, key) for key in SCALED} == SCALED
    assert value(cfg, "SOLVER.MAX_ITER") == 900 and scaled.is_frozen()
    (line,) = [r.getMessage() for r in caplog.records if "BASE_LR" in r.getMessage()]
    assert "16 to 4" in line and "BASE_LR=0.005" in line and "MAX_ITER=3600" in line


def test_scaling_is_idempotent():
    scaled = scale_to_batch(load())
    assert scale_to_batch(scaled) is scaled


@pytest.mark.parametrize("schedule", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_lr_over_the_images_seen_keeps_its_shape(schedule):
    cfg = load("SOLVER.LR_SCHEDULER_NAME", schedule, "SOLVER.BASE_LR_END", "0.001" if "Cosine" in schedule else "0.0")
    reference, scaled = rates(cfg), rates(scale_to_batch(cfg))
    assert len(scaled) == 4 * len(reference)
    torch.testing.assert_close(torch.tensor(scaled[::4]), torch.tensor(reference) / 4, rtol=1e-6, atol=0)


def test_default_is_off():
    cfg = load("SOLVER.REFERENCE_IMS_PER_BATCH", "0")
    assert scale_to_batch(cfg) is cfg
    cfg = load("SOLVER.REFERENCE_IMS_PER_BATCH", "4")
    assert scale_to_batch(cfg) is cfg


def test_grad_accumulation_counts_as_batch_size():
    cfg = load().clone()
    cfg.defrost()
    cfg.SOLVER.GRAD_ACCUM_STEPS = 2
    assert scale_to_batch(cfg).SOLVER.BASE_LR == pytest.approx(0.01)
    cfg.SOLVER.GRAD_ACCUM_STEPS = 4
    assert scale_to_batch(cfg) is cfg


def test_disabled_periods_stay_disabled_and_none_becomes_zero():
    scaled = scale_to_batch(load("SOLVER.IMS_PER_BATCH", "1600", "TEST.EVAL_PERIOD", "0", "SOLVER.STEPS", "()"))
    assert (scaled.TEST.EVAL_PERIOD, scaled.SOLVER.CHECKPOINT_PERIOD, scaled.SOLVER.MAX_ITER) == (0, 1, 9)


@pytest.mark.parametrize("opts", [["SOLVER.REFERENCE_IMS_PER_BATCH", "-1"], ["SOLVER.REFERENCE_WORLD_SIZE", "8"]])
def test_invalid_values_are_named(opts):
    with pytest.raises(ConfigError, match=opts[0].removeprefix("SOLVER.")):
        load(*opts)


def test_saved_config_is_not_scaled_again(tmp_path, train_net, metrics):
    keys = [
        "SOLVER.REFERENCE_IMS_PER_BATCH",
        "4",
        "SOLVER.BASE_LR",
        "0.002",
        "SOLVER.WARMUP_ITERS",
        "0",
        "SOLVER.MAX_ITER",
        "2",
    ]
    keys += ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    assert train_net(tmp_path / "run", *keys, "SOLVER.IMS_PER_BATCH", "2") == 0
    assert metrics(tmp_path / "run")[0]["lr"] == pytest.approx(0.001)
    assert torch.load(tmp_path / "run/model_final.pth", weights_only=True)["iteration"] == 3
    assert "from batch size 4 to 2" in (tmp_path / "run/log.txt").read_text()
    assert train_net(tmp_path / "again", config=tmp_path / "run/config.yaml", tiny=()) == 0
    assert metrics(tmp_path / "again")[0]["lr"] == pytest.approx(0.001)
    assert torch.load(tmp_path / "again/model_final.pth", weights_only=True)["iteration"] == 3
