"""The moving average of the weights against the same sums made by hand, through a stop and a resume."""

from halodet.checkpoint import Checkpointer, read_checkpoint
from halodet.engine import CANNOT_WRITE, load_config
from halodet.engine.ema import EMA, ema_decay
from halodet.errors import ConfigError

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn

DECAY = 0.5  # reached after eight updates


class Toy(nn.Module):
    """A loss with a norm in it, and a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x):
        return {"loss": self.layers(x).square().mean()}


class Note(HookBase):
    """What the weights were after each step."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        self.weights.append({name: value.clone() for name, value in self.trainer.model.state_dict().items()})


class Run:
    """As much of a DefaultTrainer as a checkpoint holds."""

    def __init__(self, trainer):
        self._trainer = trainer

    def state_dict(self):
        return {"iteration": self._trainer.iter, "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state):
        self._trainer.load_state_dict(state["_trainer"])


def data(start):
    generator = torch.Generator().manual_seed(start)
    while True:
        yield torch.randn(8, 3, generator=generator)


def trainer_of(folder, *, start=0):
    model = Toy()
    trainer = SimpleTrainer(
        model, data(start), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    )
    ema, note = EMA(model, DECAY, str(folder)), Note()
    trainer.register_hooks([ema, note])
    return trainer, ema, note, Checkpointer(model, str(folder), ema=ema.average, trainer=Run(trainer))


def by_hand(weights):
    """The average of a list of state dicts, in double precision."""
    average = {name: value.double() for name, value in weights[0].items()}
    for t, after in enumerate(weights[1:], start=1):
        decay = min(DECAY, (1 + t) / (10 + t))
        for name, value in after.items():
            buffer = "running" in name or "num_batches" in name
            average[name] = value.double() if buffer else decay * average[name] + (1 - decay) * value.double()
    return average


def assert_same(model, expected):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def test_the_average_is_that_made_by_hand(tmp_path):
    trainer, ema, note, _ = trainer_of(tmp_path)
    trainer.train(0, 15)
    expected = by_hand(note.weights)
    assert_same(ema.model, expected)
    raw = trainer.model.state_dict()
    assert not torch.allclose(raw["layers.0.weight"], ema.model.state_dict()["layers.0.weight"], atol=1e-3), (
        "the test shows nothing"
    )
    assert torch.equal(raw["layers.1.running_var"], ema.model.state_dict()["layers.1.running_var"])
    assert not ema.model.training and trainer.model.training


def test_the_decay_rises_to_the_one_set():
    assert [ema_decay(0.9999, t) for t in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema_decay(0.9999, 10**6) == 0.9999


def test_a_resumed_run_has_the_average_of_one_that_was_not_stopped(tmp_path, caplog):
    trainer, _, note, checkpointer = trainer_of(tmp_path)
    trainer.train(0, 6)
    checkpointer.save("model_0000005")
    resumed, ema, note_after, checkpointer = trainer_of(tmp_path, start=1)
    checkpointer.resume_or_load("", resume=True)
    resumed.train(6, 12)
    assert_same(ema.model, by_hand(note.weights + note_after.weights))
    assert "no average" not in caplog.text


def test_a_checkpoint_without_an_average_is_told(tmp_path, caplog):
    trainer, _, _, checkpointer = trainer_of(tmp_path)
    trainer.train(0, 3)
    del checkpointer.checkpointables["ema"]
    checkpointer.save("model_0000002")
    resumed, ema, note, checkpointer = trainer_of(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    resumed.train(3, 6)
    assert "holds no average of the weights" in caplog.text
    assert_same(ema.model, by_hand(note.weights))
    # Where nothing is left to train, the average is of what the checkpoint has, not of what the model was made with.
    finished, ema, _, checkpointer = trainer_of(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    finished.train(3, 3)
    assert_same(ema.model, finished.model.state_dict())
    assert torch.equal(
        read_checkpoint(str(tmp_path / "model_final_ema.pth"))["model"]["layers.0.weight"],
        finished.model.layers[0].weight,
    )


def test_a_run_that_is_stopped_writes_no_final_average(tmp_path):
    trainer, _, _, _ = trainer_of(tmp_path)
    trainer.model.layers[2].register_forward_hook(lambda *_: 1 / 0 if trainer.iter == 3 else None)
    with pytest.raises(ZeroDivisionError):
        trainer.train(0, 4)
    assert not list(tmp_path.glob("*ema*"))


def test_the_final_average_is_written_as_a_model_no_run_goes_on_from(tmp_path):
    trainer, ema, _, checkpointer = trainer_of(tmp_path)
    trainer.train(0, 4)
    assert not (tmp_path / "last_checkpoint").exists() and not checkpointer.has_checkpoint()
    written = read_checkpoint(str(tmp_path / "model_final_ema.pth"))
    assert written["iteration"] == 3 and set(written["model"]) == set(trainer.model.state_dict())
    for name, value in ema.model.state_dict().items():
        assert torch.equal(written["model"][name], value), name


@pytest.mark.parametrize("decay", ["1.0", "-0.1"])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ConfigError, match=f"MODEL.EMA.DECAY is {decay}, expected a share from 0 to below 1"):
        load_config("quick/mask_rcnn_halo_small", ["MODEL.EMA.DECAY", decay])


def test_a_detectors_average_is_evaluated_and_used_like_any_detector(tmp_path, train_net, metrics):
    output, again = tmp_path / "run", tmp_path / "again"
    ema = [
        "MODEL.EMA.ENABLED",
        "True",
        "SOLVER.CHECKPOINT_PERIOD",
        "2",
        "TEST.EVAL_PERIOD",
        "2",
        "SOLVER.WARMUP_ITERS",
        "0",
    ]
    assert train_net(output, *ema) == 0
    evaluated = [row for row in metrics(output) if "ema/bbox/AP" in row]
    assert len(evaluated) == 2 and all({"bbox/AP", "segm/AP", "ema/segm/AP"} <= set(row) for row in evaluated)
    raw, averaged = (read_checkpoint(str(output / f"model_final{end}.pth")) for end in ("", "_ema"))
    assert (output / "last_checkpoint").read_text() == "model_final.pth" and averaged["metadata"] == raw["metadata"]
    assert raw["ema"]["n_averaged"] == 4
    for name, value in averaged["model"].items():
        assert torch.equal(raw["ema"][f"module.{name}"], value), name
    assert any(not torch.equal(raw["model"][name], value) for name, value in averaged["model"].items())

    # Evaluated alone it gives the same detections.
    assert train_net(again, "MODEL.WEIGHTS", output / "model_final_ema.pth", flags=["--eval-only"]) == 0
    detections = [
        (folder / "coco_instances_results.json").read_text()
        for folder in (output / "inference_ema", again / "inference")
    ]
    assert detections[0] == detections[1] != (output / "inference/coco_instances_results.json").read_text()

    assert train_net(output, *ema, "SOLVER.MAX_ITER", "6", flags=["--resume"]) == 0
    assert read_checkpoint(str(output / "model_final.pth"))["ema"]["n_averaged"] == 6


def test_an_average_that_cannot_be_written_ends_the_run_with_the_code_for_that(train_net, tmp_path, capfd):
    (tmp_path / "model_final_ema.pth").mkdir()
    assert train_net(tmp_path, "MODEL.EMA.ENABLED", True, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()") == CANNOT_WRITE
    printed = "".join(capfd.readouterr())
    assert "model_final_ema.pth cannot be written" in printed and "Traceback" not in printed
    assert (tmp_path / "model_final.pth").is_file()
