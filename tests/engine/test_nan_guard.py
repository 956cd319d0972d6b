"""NaN injected into images, weights and gradients: the policies stop and skip, and a model that stays finite."""

import copy
import json
import re

from halodet.engine.nan_guard import (
    NanGuard,
    NonFiniteError,
    NonFiniteReport,
    NormStatisticsBackup,
    is_non_finite_error,
)

import nan_guard_ranks
import pytest
import torch
from detectron2.structures import Boxes
from fvcore.nn.precise_bn import update_bn_stats
from helpers import assert_same_tensors, run_ranks
from small_run import all_finite, inject_nan, make_trainer, record_steps, register_tiny_shapes
from torch import nn

SIX = {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 2}
SKIP = {"SOLVER.NON_FINITE_POLICY": "skip", "SOLVER.NON_FINITE_MAX_STEPS": 2}
FILE = r"datasets/tiny/train/\d+\.png \(id \d+\)"


def state(trainer):
    return copy.deepcopy(trainer.model.state_dict())


def test_stop_names_rank_losses_and_images_and_keeps_the_model(shapes, tmp_path, caplog):
    trainer = make_trainer(tmp_path, SIX)
    inject_nan(trainer, [3])
    steps, before = record_steps(trainer), {}
    trainer.optimizer.register_step_post_hook(lambda *_: before.update(state(trainer)))
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message, lr = str(error.value), trainer.optimizer.param_groups[0]["lr"]
    assert re.search(rf"iteration 3, learning rate {lr:.4g}: rank 0: .*images {FILE}, {FILE}\.", message), message
    assert "\n" not in message and "SOLVER.NON_FINITE_POLICY=skip" in message
    assert "Predicted boxes or scores contain Inf/NaN" in message, "Detectron2's own check comes first with a NaN image"
    assert steps == [0, 1, 2] and all_finite(trainer)
    assert_same_tensors(state(trainer), before)
    assert "Traceback" not in caplog.text and error.value.exit_code == 70
    assert sorted(f.name for f in tmp_path.glob("*.pth")) == ["model_0000001.pth"]


def test_every_loss_is_named(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX)
    trainer.model.roi_heads.mask_head.predictor.bias.data[:] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"loss_mask is .*\(loss_cls=[\d.]+, .*loss_mask=nan, .*loss_rpn_loc=[\d.]+"
    ):
        trainer.train()


def test_skip_restores_statistics_and_continues(shapes, tmp_path, caplog):
    trainer = make_trainer(tmp_path, SIX, SKIP)
    inject_nan(trainer, [1, 3])
    steps, skipped, after_step = record_steps(trainer), {}, {}
    skip_step = trainer._trainer._skip_step

    def recording(report):
        damaged = [name for name, b in trainer.model.named_buffers() if not b.isfinite().all()]
        skip_step(report)
        skipped[trainer.iter] = damaged, state(trainer)

    trainer._trainer._skip_step = recording
    trainer.optimizer.register_step_post_hook(lambda *_: after_step.update({trainer.iter: state(trainer)}))
    trainer.train()
    assert steps == [0, 2, 4, 5] and all_finite(trainer)
    assert any("running_var" in name for name in skipped[1][0]), "the statistics were not in danger"
    assert_same_tensors(skipped[1][1], after_step[0])
    assert_same_tensors(skipped[3][1], after_step[2])
    assert caplog.text.count("Skipped the step") == 2 and "(2 of at most 2)" in caplog.text
    assert trainer.data_loader.loader.batches == 6 and trainer.storage.latest()["dropped_steps"][0] == 2


def test_skip_stops_after_its_limit(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX, SKIP)
    inject_nan(trainer, [1, 2, 4])
    steps = record_steps(trainer)
    with pytest.raises(NonFiniteError, match="iteration 4,.* 3 exceeds SOLVER.NON_FINITE_MAX_STEPS=2"):
        trainer.train()
    assert steps == [0, 3] and all_finite(trainer)


def test_infinite_gradients_are_skipped(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX, SKIP, {"SOLVER.GRAD_ACCUM_STEPS": 2, "SOLVER.MAX_ITER": 4})
    steps = record_steps(trainer)
    weight = trainer.model.backbone.bottom_up.stem.conv1.conv.weight
    weight.register_hook(lambda gradient: gradient * (float("inf") if trainer.iter == 2 else 1.0))
    trainer.train()
    assert steps == [0, 1, 3] and all_finite(trainer)
    assert trainer.data_loader.loader.batches == 8


def test_only_the_images_of_the_bad_batch_are_named(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.GRAD_ACCUM_STEPS": 3})
    inject_nan(trainer, [4])
    with pytest.raises(NonFiniteError, match="iteration 1,") as error:
        trainer.train()
    assert len(re.findall(FILE, str(error.value))) == 2
    assert not any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())


def test_gather_metric_period_does_not_disable_the_guard(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX)
    trainer._trainer.gather_metric_period = 5
    inject_nan(trainer, [1])
    with pytest.raises(NonFiniteError, match="iteration 1,"):
        trainer.train()
    assert all_finite(trainer)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_decide_together(shapes, tmp_path):
    register_tiny_shapes()
    keys = {**SIX, "SOLVER.MAX_ITER": 5, "MODEL.MASK_ON": False}
    # Batch 3 is the last of an accumulated step: the forward pass fails on one rank only, and both must continue.
    runs = {"stop": keys, "skip": keys | SKIP, "accumulate": keys | SKIP | {"SOLVER.GRAD_ACCUM_STEPS": 2}}
    codes, log = run_ranks(nan_guard_ranks.work, str(shapes), str(tmp_path), runs, printed=tmp_path / "printed.txt")
    assert codes == [0, 0], log
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "the ranks differ"
    steps = {name: result["steps"] for name, result in first.items()}
    assert steps == {"stop": [0, 1, 2], "skip": [0, 1, 2, 4], "accumulate": [0, 2, 3, 4]}
    assert all(result["finite"] for result in first.values())
    logged = [line for line in log.splitlines() if "Skipped the step" in line]
    assert len(logged) == 2, "logged by the main process only"
    for message in (first["stop"]["error"], logged[0]):
        assert re.search(rf"iteration 3, .*rank 1: .*images {FILE}", message) and "rank 0" not in message, message


def test_known_errors_of_detectron2():
    with pytest.raises(AssertionError) as error:
        Boxes(torch.tensor([[0.0, 0.0, float("nan"), 1.0]])).clip((5, 5))
    assert is_non_finite_error(error.value) and is_non_finite_error(FloatingPointError("Training has diverged."))
    assert not is_non_finite_error(AssertionError("another"))
    assert not is_non_finite_error(ValueError("infinite or NaN"))


def test_statistics_are_restored_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)
    ).train()
    backup = NormStatisticsBackup(model)
    model(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    backup.save()
    model(torch.full((2, 3, 4, 4), float("nan")))
    assert not model[1].running_mean.isfinite().any()
    backup.restore()
    assert_same_tensors(model.state_dict(), before)
    assert model[1].num_batches_tracked == 1


def test_statistics_whose_tensors_were_replaced_are_restored():
    norm = nn.BatchNorm2d(3)
    backup = NormStatisticsBackup(norm)
    update_bn_stats(norm, [torch.randn(2, 3, 4, 4)], 1)  # as Detectron2's PreciseBN
    before = norm.running_mean.clone()
    backup.save()
    norm(torch.full((2, 3, 4, 4), float("nan")))
    backup.restore()
    assert torch.equal(norm.running_mean, before) and before.any()


def test_policies():
    losses = {"loss_a": float("nan"), "loss_b": 0.25}
    reports = [NonFiniteReport(1, "loss_a is not finite", losses, [("a.jpg", 7), ("b.jpg", "x")])]
    expected = r"iteration 5, learning rate 0.01 to 0.1: rank 1: .*\(loss_a=nan, loss_b=0.25\)"
    expected += r".* a.jpg \(id 7\), b.jpg \(id x\)"
    with pytest.raises(NonFiniteError, match=expected):
        NanGuard("stop").handle(5, [0.1, 0.01], reports)
    assert re.search(expected, NanGuard("skip").handle(5, [0.1, 0.01], reports))
    with pytest.raises(NonFiniteError, match="SOLVER.NON_FINITE_MAX_STEPS=0"):
        NanGuard("skip", 0).handle(5, [0.1], reports)
    with pytest.raises(ValueError, match="SOLVER.NON_FINITE_POLICY=rollback"):
        NanGuard("rollback")
