"""The schedule fitted to the batch: the rate at each share of the images seen is that of the reference, times the factor."""

import logging

from halodet.engine import Trainer, load_config, scale_to_batch
from halodet.errors import ConfigError

import pytest
import torch

KEYS = [
    "SOLVER.IMS_PER_BATCH", "4", "SOLVER.REFERENCE_IMS_PER_BATCH", "16", "SOLVER.BASE_LR", "0.02", "SOLVER.MAX_ITER", "900",
    "SOLVER.STEPS", "(600, 800)", "SOLVER.WARMUP_ITERS", "100", "SOLVER.CHECKPOINT_PERIOD", "50", "TEST.EVAL_PERIOD", "30",
    "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR",
]  # fmt: skip
SCALED = {
    "SOLVER.BASE_LR": 0.005, "SOLVER.MAX_ITER": 3600, "SOLVER.STEPS": (2400, 3200), "SOLVER.WARMUP_ITERS": 400,
    "SOLVER.CHECKPOINT_PERIOD": 200, "TEST.EVAL_PERIOD": 120, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.REFERENCE_IMS_PER_BATCH": 4,
}  # fmt: skip


def load(*opts):
    return load_config("quick/mask_rcnn_halo_small", [*KEYS, *opts])


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def rates(cfg):
    """The rate at each iteration of the run."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    schedule = Trainer.build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_everything_counted_in_iterations_is_scaled_and_said_in_one_line(caplog):
    caplog.set_level(logging.INFO)
    cfg = load()
    scaled = scale_to_batch(cfg)
    assert {key: value(scaled, key) for key in SCALED} == SCALED
    assert value(cfg, "SOLVER.MAX_ITER") == 900 and scaled.is_frozen()
    lines = [
        r.getMessage() for r in caplog.records if "REFERENCE" in r.getMessage() or "schedule for" in r.getMessage()
    ]
    assert (
        len(lines) == 1
        and "batch is 4 and the schedule for one of 16: BASE_LR is now 0.005 (times 0.25), MAX_ITER 3600" in lines[0]
    )


def test_scaling_twice_is_scaling_once():
    scaled = scale_to_batch(load())
    assert scale_to_batch(scaled) is scaled


@pytest.mark.parametrize("schedule", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_the_rate_over_the_images_seen_keeps_its_shape(schedule):
    cfg = load("SOLVER.LR_SCHEDULER_NAME", schedule, "SOLVER.BASE_LR_END", "0.001" if "Cosine" in schedule else "0.0")
    reference, scaled = rates(cfg), rates(scale_to_batch(cfg))
    assert len(scaled) == 4 * len(reference)
    torch.testing.assert_close(torch.tensor(scaled[::4]), torch.tensor(reference) / 4, rtol=1e-6, atol=0)


def test_it_is_off_unless_asked_for():
    cfg = load("SOLVER.REFERENCE_IMS_PER_BATCH", "0")
    assert scale_to_batch(cfg) is cfg
    cfg = load("SOLVER.REFERENCE_IMS_PER_BATCH", "4")
    assert scale_to_batch(cfg) is cfg


def test_accumulated_batches_count_as_one():
    cfg = load().clone()
    cfg.defrost()
    cfg.SOLVER.GRAD_ACCUM_STEPS = 2
    assert scale_to_batch(cfg).SOLVER.BASE_LR == pytest.approx(0.01)
    cfg.SOLVER.GRAD_ACCUM_STEPS = 4
    assert scale_to_batch(cfg) is cfg


def test_periods_that_are_off_stay_off_and_none_becomes_zero():
    scaled = scale_to_batch(load("SOLVER.IMS_PER_BATCH", "1600", "TEST.EVAL_PERIOD", "0", "SOLVER.STEPS", "()"))
    assert (scaled.TEST.EVAL_PERIOD, scaled.SOLVER.CHECKPOINT_PERIOD, scaled.SOLVER.MAX_ITER) == (0, 1, 9)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ["SOLVER.REFERENCE_IMS_PER_BATCH", "-1"],
            "SOLVER.REFERENCE_IMS_PER_BATCH is -1, expected the images in a batch",
        ),
        (["SOLVER.REFERENCE_WORLD_SIZE", "8"], "both scale the rate: set one of them to 0"),
    ],
)
def test_mistakes_are_told(opts, message):
    with pytest.raises(ConfigError, match=message):
        load(*opts)


def test_a_run_is_scaled_and_its_saved_config_is_not_scaled_again(tmp_path, train_net, metrics):
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
    assert "The batch is 2 and the schedule for one of 4" in (tmp_path / "run/log.txt").read_text()
    assert train_net(tmp_path / "again", config=tmp_path / "run/config.yaml", tiny=()) == 0
    assert metrics(tmp_path / "again")[0]["lr"] == pytest.approx(0.001)
    assert torch.load(tmp_path / "again/model_final.pth", weights_only=True)["iteration"] == 3
