"""A stopped and resumed run ends with the bits of the uninterrupted run: weights, optimizer, random states, data."""

import errno
import logging
import os
import random
import signal
from types import FunctionType

from halodet.checkpoint import Checkpointer
from halodet.engine.preemption import PREEMPTED
from halodet.engine.resume_state import config_diff
from halodet.errors import CheckpointWriteError
from halodet.evaluation.coco import RobustCOCOEvaluator
from halodet.utils import rng

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch import retinanet
from detectron2.utils.env import seed_all_rng
from fvcore.nn import sigmoid_focal_loss
from helpers import differences
from small_run import TRAIN, VAL, make_trainer

pytestmark = pytest.mark.usefixtures("shapes")
LAST = 5
RUN = {
    "INPUT.MIN_SIZE_TRAIN": "(48, 64)",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.RANDOM_FLIP": "horizontal",
    "MODEL.HALONET.NORM": "GN",
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.BASE_LR": 0.002,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SOLVER.MAX_ITER": LAST,
    "SEED": 5,
}
EVALUATE = {"DATASETS.TEST": f"('{VAL}',)", "TEST.EVAL_PERIOD": 2}
RETINANET = {
    "MODEL.RETINANET.NUM_CLASSES": 6,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "INPUT.MASK_FORMAT": "bitmask",
    "SOLVER.STEPS": "(4,)",
}


class SendSignal(HookBase):
    """Sends a signal to this process in the middle of an iteration."""

    def __init__(self, number, iteration):
        self.number, self.iteration = number, iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


def trainer(folder, *options, seed=5, resume=False, config="quick/mask_rcnn_halo_shapes"):
    made = make_trainer(folder, RUN, *options, seed=seed, config=config)
    made.resume_or_load(resume=resume)
    return made


def stop(made, iteration, number=signal.SIGTERM):
    """Train until a signal at ``iteration`` stops the run."""
    made.register_hooks([SendSignal(number, iteration)])
    with pytest.raises(SystemExit) as caught:
        made.train()
    assert caught.value.code == PREEMPTED
    return made


def load(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def assert_same_run(left, right):
    """Assert that two checkpoints are bit-equal, but for the time at which the runs were started."""
    assert [path for path in differences(left, right) if not path.endswith(".started")] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        EVALUATE,
        EVALUATE
        | {"MODEL.HALONET.NORM": "BN", "TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2}
        | {"SOLVER.OPTIMIZER_NAME": "SGD", "MODEL.HALONET.DROP_PATH_RATE": 0.5},
        {"MODEL.EMA.ENABLED": True, "SOLVER.GRAD_ACCUM_STEPS": 2, "SOLVER.AMP.ENABLED": True},
    ],
    ids=["evaluation", "precise_bn", "ema"],
)
def test_a_resumed_run_is_bit_equal(tmp_path, options):
    trainer(tmp_path / "whole", options).train()
    # Other numbers of workers and another global seed; the evaluation that was due at the stop is skipped.
    stop(trainer(tmp_path / "parts", options, {"DATALOADER.NUM_WORKERS": 2}), 1)
    resumed = trainer(tmp_path / "parts", options, seed=99, resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    whole = load(tmp_path / "whole")
    assert_same_run(whole, load(tmp_path / "parts"))
    first = load(tmp_path / "whole", "model_0000001")
    assert len(differences(whole["model"], first["model"])) > 50, "little was trained"


def forget_torchscript(monkeypatch):
    """Recompile RetinaNet's loss as in a new process, where TorchScript compiles it by what its first calls are."""
    original = sigmoid_focal_loss
    loss = FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__, original.__closure__
    )
    loss.__annotations__ = original.__annotations__
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", torch.jit.script(loss))


@pytest.mark.slow
def test_a_resumed_retinanet_is_bit_equal(tmp_path, monkeypatch):
    """Its loss is compiled by TorchScript, and its loss normalizer is outside of the state dict."""
    forget_torchscript(monkeypatch)
    trainer(tmp_path / "whole", RETINANET, config="retinanet_halo_h4").train()
    forget_torchscript(monkeypatch)
    stopped = stop(trainer(tmp_path / "parts", RETINANET, config="retinanet_halo_h4"), 3)
    forget_torchscript(monkeypatch)
    resumed = trainer(tmp_path / "parts", RETINANET, resume=True, config="retinanet_halo_h4")
    assert resumed.model.loss_normalizer == stopped.model.loss_normalizer != 100
    resumed.train()
    assert_same_run(load(tmp_path / "whole"), load(tmp_path / "parts"))


def test_without_resume_state_a_resumed_run_differs(tmp_path):
    """Shows that the comparison of the tests above would find a difference."""
    trainer(tmp_path / "whole").train()
    stop(trainer(tmp_path / "parts"), 1)
    file = tmp_path / "parts" / "model_0000001.pth"
    data = torch.load(file, weights_only=True)
    del data["trainer"]["hooks"]["ResumeState"]
    torch.save(data, file)
    trainer(tmp_path / "parts", resume=True).train()
    assert differences(load(tmp_path / "whole")["model"], load(tmp_path / "parts")["model"])


def test_changes_of_the_config_are_logged_in_one_line(tmp_path, caplog):
    options = {"MODEL.EMA.ENABLED": True, "SOLVER.MAX_ITER": 8}
    stop(trainer(tmp_path, options), 3)
    other = {
        "MODEL.EMA.ENABLED": False,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.BASE_LR": 0.5,
        "DATASETS.TRAIN": f"('{VAL}',)",
    }

    def resume(*changes):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = trainer(tmp_path, options, *changes, resume=True)
        return made, [r.getMessage() for r in caplog.records if "differs from the checkpoint" in r.getMessage()]

    assert resume({"TEST.EVAL_PERIOD": 7, "DATALOADER.NUM_WORKERS": 0})[1] == []
    resumed, lines = resume(other)
    assert len(lines) == 1 and "\n" not in lines[0]
    changes = ("MODEL.EMA.ENABLED: True -> False", "SOLVER.IMS_PER_BATCH: 2 -> 4", f"('{TRAIN}',) -> ('{VAL}',)", "0.5")
    assert all(change in lines[0] for change in changes), lines[0]
    assert "SEED: 5 -> 6" in resume({"SEED": 6})[1][0]
    assert resumed.start_iter == 4 and resumed.data_loader.loader.start == 2, "8 images were seen"
    learning_rates = {round(group["initial_lr"], 6) for group in resumed.optimizer.param_groups}
    assert learning_rates == {0.002}, "the optimizer's state has the checkpoint's"


def test_config_diff():
    old = {f"KEY{i:02}": "a" for i in range(20)} | {"SOLVER.BASE_LR": "1", "GONE": "1"}
    assert config_diff(old, dict(old, NEW="3")) == ""
    many = config_diff(old, {key: "b" for key in old})
    assert many.startswith("GONE: 1 -> b, KEY00: a -> b") and "KEY11" not in many and "10 more" in many
    assert many.count("SOLVER.BASE_LR") == 1 and "MODEL.WEIGHTS" in many


def test_a_stopped_run_restores_the_signal_handlers_and_names_the_exit_code(tmp_path, caplog):
    before = signal.getsignal(signal.SIGUSR1)
    with caplog.at_level(logging.WARNING):
        stop(trainer(tmp_path), 2, signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert "SIGUSR1 after iteration 2" in caplog.text and "75" in caplog.text and "Traceback" not in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert load(tmp_path, "model_0000002")["iteration"] == 2


def test_a_signal_in_the_last_iteration_skips_the_evaluation(tmp_path):
    options = EVALUATE | {"TEST.EVAL_PERIOD": 100, "SOLVER.MAX_ITER": 2}
    stop(trainer(tmp_path, options), 1)
    assert (tmp_path / "model_final.pth").is_file() and not (tmp_path / "inference").exists()
    trainer(tmp_path, options, resume=True).train()
    assert (tmp_path / "inference").exists()


def test_a_signal_in_an_evaluation_saves_before_the_next_batch(tmp_path, monkeypatch):
    options = EVALUATE | {"SOLVER.CHECKPOINT_PERIOD": 100, "SOLVER.MAX_ITER": 3}
    trainer(tmp_path / "whole", options).train()
    made = trainer(tmp_path / "parts", options)
    process, evaluated = RobustCOCOEvaluator.process, []

    def process_first(self, inputs, outputs):
        torch.rand(7)
        os.kill(os.getpid(), signal.SIGTERM)
        evaluated.extend(inputs)
        return process(self, inputs, outputs)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as caught:
        patched.setattr(RobustCOCOEvaluator, "process", process_first)
        made.train()
    assert caught.value.code == PREEMPTED and len(evaluated) == 1
    assert load(tmp_path / "parts", "model_0000001")["iteration"] == 1
    trainer(tmp_path / "parts", options, seed=9, resume=True).train()
    assert_same_run(load(tmp_path / "whole"), load(tmp_path / "parts"))


def test_random_states_through_a_checkpoint(tmp_path):
    def draw():
        return random.gauss(0, 1), np.random.randn(), random.random(), np.random.rand(), torch.rand(1)

    seed_all_rng(4)
    random.gauss(0, 1), np.random.randn()  # each keeps a second number for its next call
    torch.save(rng.capture(), tmp_path / "state.pth")
    expected = draw()
    seed_all_rng(5)
    rng.restore(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() == expected


def test_seeded_streams():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    draws = []
    for key in ((1, 2), (1, 3), (1, 2)):
        with rng.seeded(*key):
            draws.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert draws[0] == draws[2] and all(a != b for a, b in zip(*draws[:2], strict=True))
    assert torch.equal(torch.rand(2), expected), "the outer stream must not change"


def test_the_newest_checkpoints_are_kept(tmp_path):
    (tmp_path / ".model_0000001.pth.abc.part").write_text("half")
    (tmp_path / "notes.pth").write_text("a user's file")
    (tmp_path / "model_0099999.pth").write_text("of an earlier run")
    trainer(tmp_path, {"SOLVER.CHECKPOINT_MAX_TO_KEEP": 2, "SOLVER.CHECKPOINT_PERIOD": 1}).train()
    names = {"model_0000003.pth", "model_0000004.pth", "model_final.pth", "notes.pth", "model_0099999.pth"}
    assert {name for name in os.listdir(tmp_path) if ".pth" in name} == names


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "model_0000000.pth").mkdir()  # unlink fails
    trainer(tmp_path, {"SOLVER.CHECKPOINT_MAX_TO_KEEP": 1}).train()
    assert (tmp_path / "model_final.pth").is_file() and "model_0000000.pth" in caplog.text


def test_a_failed_write_keeps_older_checkpoints_and_skips_the_evaluation(tmp_path, monkeypatch):
    write = Checkpointer.write

    def fail_late(self, data, file):
        if data["iteration"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data, file)

    monkeypatch.setattr(Checkpointer, "write", fail_late)
    options = EVALUATE | {"SOLVER.CHECKPOINT_MAX_TO_KEEP": 1, "TEST.EVAL_PERIOD": 0}
    with pytest.raises(CheckpointWriteError, match="model_0000003.pth") as error:
        trainer(tmp_path, options).train()
    assert error.value.exit_code == 74 and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth" and not (tmp_path / "inference").exists()
    monkeypatch.undo()
    resumed = trainer(tmp_path, options, resume=True)
    assert resumed.start_iter == 2
