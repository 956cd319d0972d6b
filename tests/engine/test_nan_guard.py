"""NaN planted in images, weights and gradients: stop, skip and rollback do what they say, and what is left is finite."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

from halodet.engine.nan_guard import Fault, KeptStatistics, NonFiniteError, Policy, RollBack, is_non_finite

import pytest
import torch
from detectron2.structures import Boxes
from fvcore.nn.precise_bn import update_bn_stats
from small_run import make_trainer, spoil
from torch import nn

ROOT = Path(__file__).parents[2]
SIX = {"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 2}
FILE = r"datasets/shapes/train/\d+\.png \(id \d+\)"


def taken(trainer):
    """The iterations in which the optimizer makes a step, as they come."""
    steps = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.iter))
    return steps


def all_finite(trainer):
    return all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())


def state(trainer):
    return copy.deepcopy(trainer.model.state_dict())


def equal(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_stop_names_everything_and_leaves_the_model_as_it_was(shapes, tmp_path, caplog):
    trainer = make_trainer(tmp_path, SIX)
    spoil(trainer, [3])
    steps, before = taken(trainer), {}
    trainer.optimizer.register_step_post_hook(lambda *_: before.update(state(trainer)))
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    told = str(error.value)
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert (
        re.search(rf"^iteration 3, learning rate {rate:.4g}: .*on rank 0 with the images {FILE}, {FILE}: ", told)
        and "\n" not in told
    )
    assert "Predicted boxes or scores contain Inf/NaN" in told, "Detectron2's own check comes first with a NaN image"
    assert steps == [0, 1, 2] and all_finite(trainer) and equal(state(trainer), before)
    assert "Traceback" not in caplog.text and error.value.exit_code == 70
    assert sorted(f.name for f in tmp_path.glob("*.pth")) == ["model_0000001.pth"]


def test_every_loss_is_named(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX)
    trainer.model.roi_heads.mask_head.predictor.bias.data[:] = float("nan")
    with pytest.raises(
        NonFiniteError,
        match=r"iteration 0.*: loss_mask not finite \(loss_cls [\d.]+, .*loss_mask nan, .*loss_rpn_loc [\d.]+\)",
    ):
        trainer.train()


def test_skip_drops_the_step_and_goes_on(shapes, tmp_path, caplog):
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.NON_FINITE_POLICY": "skip", "SOLVER.NON_FINITE_MAX_STEPS": 2})
    spoil(trainer, [1, 3])
    steps, seen = taken(trainer), {}
    step = trainer._trainer
    original = step._give_up

    def give_up(fault):
        spoiled = [name for name, b in trainer.model.named_buffers() if not b.isfinite().all()]
        original(fault)
        seen[trainer.iter] = spoiled, state(trainer)

    step._give_up = give_up
    trainer.optimizer.register_step_post_hook(lambda *_: seen.setdefault(f"after {trainer.iter}", state(trainer)))
    trainer.train()
    assert steps == [0, 2, 4, 5] and all_finite(trainer)
    assert any("running_var" in name for name in seen[1][0]), "the statistics were not in danger"
    assert equal(seen[1][1], seen["after 0"]) and equal(seen[3][1], seen["after 2"])
    assert caplog.text.count("the step is dropped") == 2 and "(2 of at most 2)" in caplog.text
    assert step.batches == 6 and trainer.storage.latest()["dropped_steps"][0] == 2


def test_skip_ends_at_its_limit(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.NON_FINITE_POLICY": "skip", "SOLVER.NON_FINITE_MAX_STEPS": 2})
    spoil(trainer, [1, 2, 4])
    steps = taken(trainer)
    with pytest.raises(NonFiniteError, match="iteration 4.* this is number 3, and SOLVER.NON_FINITE_MAX_STEPS is 2"):
        trainer.train()
    assert steps == [0, 3] and all_finite(trainer)


def test_gradients_are_looked_at_too(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.NON_FINITE_POLICY": "skip", "SOLVER.GRAD_ACCUM_STEPS": 2})
    steps = taken(trainer)
    weight = trainer.model.backbone.bottom_up.stem.conv1.conv.weight
    weight.register_hook(lambda gradient: gradient * (float("inf") if trainer.iter == 2 else 1.0))
    trainer.train()
    assert steps == [0, 1, 3, 4, 5] and all_finite(trainer)
    assert trainer._trainer.batches == 12


def test_only_the_images_of_the_bad_batch_are_named(shapes, tmp_path):
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.GRAD_ACCUM_STEPS": 3})
    spoil(trainer, [4])
    with pytest.raises(NonFiniteError, match="iteration 1") as error:
        trainer.train()
    assert len(re.findall(FILE, str(error.value))) == 2
    assert not any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())


def test_rollback_repeats_from_the_last_checkpoint_with_other_data(shapes, tmp_path, caplog):
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.NON_FINITE_POLICY": "rollback", "SOLVER.NON_FINITE_MAX_STEPS": 2})
    spoil(trainer, [3, 5])  # in iteration 3, and, two batches later, in its repetition
    steps, rates, before, after = taken(trainer), {}, [], {}
    optimizer = trainer.optimizer

    def look(*_):
        rates.setdefault(trainer.iter, []).append(optimizer.param_groups[0]["lr"])
        if trainer.iter == 2:
            before.append((state(trainer), [v["exp_avg"].clone() for v in optimizer.state.values()]))

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(
        lambda *_: after.update({trainer.iter: state(trainer)} if trainer.iter < 2 else {})
    )
    trainer.train()
    assert steps == [0, 1, 2, 2, 2, 3, 4, 5] and all_finite(trainer)
    assert caplog.text.count("model_0000001.pth, and on from iteration 2 with the data that come next") == 2
    parameters = dict(trainer.model.named_parameters())
    for weights, momenta in before:  # each time as it was after iteration 1
        assert all(torch.equal(weights[name], after[1][name]) for name in parameters)
        assert all(torch.equal(a, b) for a, b in zip(momenta, before[0][1], strict=True))
    assert len(set(rates[2])) == 1 and len(rates[2]) == 3
    assert trainer._trainer.batches == 10, "the data go on"
    assert trainer.iter == 6 and trainer.scheduler.last_epoch == 6
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 5


def test_rollback_needs_a_checkpoint_of_this_run(shapes, tmp_path):
    earlier = make_trainer(tmp_path, {"SOLVER.MAX_ITER": 1})
    earlier.train()
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.NON_FINITE_POLICY": "rollback"})
    spoil(trainer, [1])
    with pytest.raises(NonFiniteError, match="iteration 1.*there is no checkpoint of this run to go back to yet"):
        trainer.train()
    assert all_finite(trainer)


def test_rollback_ends_at_its_limit_and_takes_the_checkpoint_resumed_from(shapes, tmp_path):
    make_trainer(tmp_path, {"SOLVER.MAX_ITER": 2}).train()
    trainer = make_trainer(tmp_path, SIX, {"SOLVER.NON_FINITE_POLICY": "rollback", "SOLVER.NON_FINITE_MAX_STEPS": 1})
    trainer.resume_or_load(resume=True)
    spoil(trainer, [1, 2])
    steps = taken(trainer)
    with pytest.raises(NonFiniteError, match="iteration 2.* number 2, and SOLVER.NON_FINITE_MAX_STEPS is 1"):
        trainer.train()
    assert steps == [2] and all_finite(trainer)


@pytest.mark.parametrize("period", [1, 5])
def test_detectron2s_period_of_metrics_lets_nothing_through(shapes, tmp_path, period):
    trainer = make_trainer(tmp_path, SIX)
    trainer._trainer.gather_metric_period = period
    spoil(trainer, [1])
    with pytest.raises(NonFiniteError, match="iteration 1,"):
        trainer.train()
    assert all_finite(trainer)


def test_two_processes_decide_together(shapes, tmp_path):
    steps = {"stop": [0, 1, 2], "skip": [0, 1, 2, 4, 5], "rollback": [0, 1, 2, 2, 3, 4, 5]}
    given = [json.dumps(what) for what in ({**SIX, "MODEL.MASK_ON": False}, list(steps), [3])]
    command = [sys.executable, str(Path(__file__).with_name("finite_ranks.py")), str(tmp_path), *given]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    log = run.stdout + run.stderr
    assert run.returncode == 0, log
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "the ranks went apart"
    for policy, told in first.items():
        assert told["finite"] and told["steps"] == steps[policy], policy
    assert len({told["weights"] for told in first.values()}) == 3
    sentences = [first["stop"]["error"], *(line for line in log.splitlines() if line.startswith("iteration 3"))]
    assert len(sentences) == 3, "one is raised, and two are logged, by the first process alone"
    for told, end in zip(sentences, ("lower SOLVER.BASE_LR", "the step is dropped", "going back to"), strict=True):
        assert re.search(rf"^iteration 3, learning rate [\d.e-]+: .*on rank 1 with the images {FILE}.*{end}", told), (
            told
        )
        assert "on rank 0" not in told


def test_two_processes_go_on_together_after_an_accumulated_step_was_dropped_at_its_last_batch(shapes, tmp_path):
    """On one of them the forward pass then failed, and on the other it did not."""
    keys = {**SIX, "SOLVER.MAX_ITER": 4, "SOLVER.GRAD_ACCUM_STEPS": 2, "MODEL.MASK_ON": False}
    given = [json.dumps(what) for what in (keys, ["skip"], [3])]
    command = [sys.executable, str(Path(__file__).with_name("finite_ranks.py")), str(tmp_path), *given]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text())["skip"] for rank in (0, 1))
    assert first == second and first["finite"] and first["steps"] == [0, 2, 3]


def test_a_run_that_diverges_ends_with_a_sentence_and_its_own_exit_code(shapes, tmp_path):
    keys = {
        "SOLVER.BASE_LR": 1e20,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CLIP_GRADIENTS.ENABLED": False,
        "SOLVER.OPTIMIZER": "SGD",
    }
    small = {
        **keys,
        "MODEL.HALONET.BASE_WIDTH": 16,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 9,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
    }
    small |= {"OUTPUT_DIR": tmp_path, "DATASETS.TEST": "()"}
    tool = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", "quick/mask_rcnn_halo_shapes"]
    run = subprocess.run(
        [*tool, *(str(w) for pair in small.items() for w in pair)], capture_output=True, text=True, timeout=240
    )
    log = run.stdout + run.stderr
    assert run.returncode == 70, log
    assert "Traceback" not in log and re.search(
        r"ERROR.*iteration \d, learning rate [\d.]+e\+\d\d: .* on rank 0 with the images", log
    ), log
    assert not list(tmp_path.glob("*.pth"))


def test_detectron2s_own_complaints_are_known():
    with pytest.raises(AssertionError) as error:
        Boxes(torch.tensor([[0.0, 0.0, float("nan"), 1.0]])).clip((5, 5))
    assert is_non_finite(error.value) and is_non_finite(FloatingPointError("Training has diverged."))
    assert not is_non_finite(AssertionError("another")) and not is_non_finite(ValueError("infinite or NaN"))


def test_statistics_come_back_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)
    ).train()
    kept = KeptStatistics(model)
    model(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    kept.save()
    model(torch.full((2, 3, 4, 4), float("nan")))
    assert not model[1].running_mean.isfinite().any()
    kept.restore()
    assert (
        all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        and model[1].num_batches_tracked == 1
    )


def test_statistics_that_were_put_in_the_place_of_others_come_back():
    norm = nn.BatchNorm2d(3)
    kept = KeptStatistics(norm)
    update_bn_stats(norm, [torch.randn(2, 3, 4, 4)], 1)  # Detectron2's PreciseBN
    before = norm.running_mean.clone()
    kept.save()
    norm(torch.full((2, 3, 4, 4), float("nan")))
    kept.restore()
    assert torch.equal(norm.running_mean, before) and before.any()


def test_policies():
    faults = [Fault(1, "loss_a not finite", {"loss_a": float("nan"), "loss_b": 0.25}, [("a.jpg", 7), ("b.jpg", "x")])]
    said = (
        "iteration 5, learning rate 0.01 to 0.1: loss_a not finite (loss_a nan, loss_b 0.25) on rank 1 "
        "with the images a.jpg (id 7), b.jpg (id x)"
    )
    with pytest.raises(NonFiniteError, match=re.escape(said)):
        Policy("stop").apply(5, [0.1, 0.01], faults)
    assert said in Policy("skip").apply(5, [0.1, 0.01], faults)
    with pytest.raises(RollBack, match=re.escape(said)):
        Policy("rollback").apply(5, [0.1, 0.01], faults)
    with pytest.raises(NonFiniteError, match="number 1"):
        Policy("rollback", 0).apply(5, [0.1], faults)
    with pytest.raises(ValueError, match="SOLVER.NON_FINITE_POLICY is 'ignore', expected one of"):
        Policy("ignore")
    with pytest.raises(ValueError, match="LIMIT is -1"):
        Policy("skip", -1)
