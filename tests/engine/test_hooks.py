"""Hooks: the EMA against the same sums made by hand, throughput, visualization."""

import logging

from halodet.checkpoint import Checkpointer, read_checkpoint
from halodet.engine.hooks import EMA, Throughput, VisualizePredictions, ema_decay, peak_memory
from halodet.engine.writers import ProgressPrinter
from halodet.errors import CheckpointWriteError

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import HookBase, SimpleTrainer, TrainerBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import assert_same_tensors
from PIL import Image
from small_run import VAL, make_trainer
from torch import nn

DECAY = 0.5  # reached after eight updates


class Toy(nn.Module):
    """A loss, with a norm and a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x):
        return {"loss": self.layers(x).square().mean()}


class RecordWeights(HookBase):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        self.weights.append({name: value.clone() for name, value in self.trainer.model.state_dict().items()})


class State:
    """What a checkpoint holds of a DefaultTrainer."""

    def __init__(self, trainer):
        self._trainer = trainer

    def state_dict(self):
        return {"iteration": self._trainer.iter, "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state):
        self._trainer.load_state_dict(state["_trainer"])


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(8, 3, generator=generator)


def ema_trainer(folder, *, seed=0):
    model = Toy()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    trainer = SimpleTrainer(model, data(seed), optimizer)
    ema, record = EMA(model, DECAY, str(folder)), RecordWeights()
    trainer.register_hooks([ema, record])
    return trainer, ema, record, Checkpointer(model, str(folder), ema=ema.average, trainer=State(trainer))


def average_by_hand(weights):
    """The average of a list of state dicts in double precision."""
    average = {name: value.double() for name, value in weights[0].items()}
    for t, after in enumerate(weights[1:], start=1):
        decay = min(DECAY, (1 + t) / (10 + t))
        for name, value in after.items():
            buffer = "running" in name or "num_batches" in name
            average[name] = value.double() if buffer else decay * average[name] + (1 - decay) * value.double()
    return average


def assert_close(model, expected):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def test_ema_equals_the_average_made_by_hand(tmp_path):
    trainer, ema, record, checkpointer = ema_trainer(tmp_path)
    trainer.train(0, 15)
    assert_close(ema.model, average_by_hand(record.weights))
    weights, average = trainer.model.state_dict(), ema.model.state_dict()
    assert not torch.allclose(weights["layers.0.weight"], average["layers.0.weight"], atol=1e-3), "nothing was tested"
    assert torch.equal(weights["layers.1.running_var"], average["layers.1.running_var"])
    assert not ema.model.training and trainer.model.training
    written = read_checkpoint(str(tmp_path / "model_final_ema.pth"))
    assert written["iteration"] == 14
    assert_same_tensors(written["model"], average)
    assert not checkpointer.has_checkpoint(), "a run must not resume from the average"


def test_ema_decay_rises_to_its_limit():
    assert [ema_decay(0.9999, t) for t in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema_decay(0.9999, 10**6) == 0.9999


def test_a_resumed_ema_equals_an_uninterrupted_one(tmp_path, caplog):
    trainer, _, record, checkpointer = ema_trainer(tmp_path)
    trainer.train(0, 6)
    checkpointer.save("model_0000005")
    resumed, ema, record_after, checkpointer = ema_trainer(tmp_path, seed=1)
    checkpointer.resume_or_load("", resume=True)
    resumed.train(6, 12)
    assert_close(ema.model, average_by_hand(record.weights + record_after.weights))
    assert "MODEL.EMA" not in caplog.text


def test_a_checkpoint_without_ema(tmp_path, caplog):
    trainer, _, _, checkpointer = ema_trainer(tmp_path)
    trainer.train(0, 3)
    del checkpointer.checkpointables["ema"]
    checkpointer.save("model_0000002")
    resumed, ema, record, checkpointer = ema_trainer(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    resumed.train(3, 6)
    assert "MODEL.EMA" in caplog.text
    assert_close(ema.model, average_by_hand(record.weights))
    # Without iterations left, the average is that of the checkpoint, not of the initialization.
    finished, ema, _, checkpointer = ema_trainer(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    finished.train(3, 3)
    assert_close(ema.model, finished.model.state_dict())


def test_a_failed_run_writes_no_ema(tmp_path):
    trainer, _, _, _ = ema_trainer(tmp_path)
    trainer.model.layers[2].register_forward_hook(lambda *_: 1 / 0 if trainer.iter == 3 else None)
    with pytest.raises(ZeroDivisionError):
        trainer.train(0, 4)
    assert not list(tmp_path.glob("*ema*"))


def test_ema_of_a_detector_is_evaluated_saved_and_usable_as_weights(shapes, tmp_path, metrics):
    keys = {"MODEL.EMA.ENABLED": True, "TEST.EVAL_PERIOD": 2, "SOLVER.WARMUP_ITERS": 0, "SOLVER.MAX_ITER": 4}
    keys |= {"DATASETS.TEST": f"('{VAL}',)", "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
    trainer = make_trainer(tmp_path, keys)
    trainer.train()
    evaluated = [row for row in metrics(tmp_path) if "ema/bbox/AP" in row]
    assert len(evaluated) == 2 and all({"bbox/AP", "segm/AP", "ema/segm/AP"} <= set(row) for row in evaluated)
    final, averaged = (read_checkpoint(str(tmp_path / f"model_final{end}.pth")) for end in ("", "_ema"))
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert averaged["metadata"] == final["metadata"] and final["ema"]["n_averaged"] == 4
    for name, value in averaged["model"].items():
        assert torch.equal(final["ema"][f"module.{name}"], value), name
    assert any(not torch.equal(final["model"][name], value) for name, value in averaged["model"].items())
    alone = make_trainer(tmp_path / "alone", keys, {"MODEL.WEIGHTS": tmp_path / "model_final_ema.pth"})
    alone.resume_or_load(resume=False)
    alone.test(alone.cfg, alone.model)
    folders = (tmp_path / "inference_ema", tmp_path / "alone/inference", tmp_path / "inference")
    ema, loaded, weights = ((folder / "coco_instances_results.json").read_text() for folder in folders)
    assert ema == loaded != weights


def test_an_ema_that_cannot_be_written(shapes, tmp_path):
    (tmp_path / "model_final_ema.pth").mkdir()
    trainer = make_trainer(tmp_path, {"MODEL.EMA.ENABLED": True, "SOLVER.MAX_ITER": 1})
    with pytest.raises(CheckpointWriteError, match="model_final_ema.pth") as error:
        trainer.train()
    assert error.value.exit_code == 74 and (tmp_path / "model_final.pth").is_file()


def test_throughput_of_timed_iterations_only(caplog):
    caplog.set_level(logging.INFO)
    trainer = TrainerBase()
    hook = Throughput(8)
    trainer.register_hooks([hook])
    with EventStorage(0) as trainer.storage:
        hook.after_step()
        ProgressPrinter(10).write()
        assert set(trainer.storage.latest()) == {"memory_mib"} and "images/s" not in caplog.text
        assert 50 < trainer.storage.latest()["memory_mib"][0] <= peak_memory()
        for trainer.iter, seconds in ((1, 2.0), (2, 4.0), (3, 1.0)):
            trainer.storage.iter = trainer.iter
            trainer.storage.put_scalars(time=seconds, data_time=0.5)
            hook.after_step()
        trainer.iter = trainer.storage.iter = 4  # not timed
        hook.after_step()
        assert [v for v, _ in trainer.storage.history("images_per_second").values()] == [4.0, 2.0, 8.0]
        assert [v for v, _ in trainer.storage.history("data_share").values()] == [0.25, 0.125, 0.5]
        ProgressPrinter(10).write()
    assert "images/s: 4  waiting for data: 25%" in caplog.text


class OneBox(nn.Module):
    """Detects one box, the middle half of each image, in the coordinates of the image that was read."""

    def forward(self, inputs):
        assert not self.training and inputs[0]["image"].dtype == torch.float32
        self.seen = inputs[0]["image"]
        height, width = inputs[0]["height"], inputs[0]["width"]
        box = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
        fields = {"pred_boxes": Boxes(box), "scores": torch.tensor([0.9]), "pred_classes": torch.tensor([0])}
        return [{"instances": Instances((height, width), **fields)}]


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_visualization_draws_the_predictions_and_skips_unreadable_images(tmp_path, caplog, order):
    red = np.zeros((400, 600, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    name = f"visualization_{order}"
    DatasetCatalog.register(name, lambda: [{"file_name": str(tmp_path / file)} for file in ("red.png", "broken.png")])
    MetadataCatalog.get(name).thing_classes = ["thing"]
    hook = VisualizePredictions(name, 1, 2, image_format=order, augmentation=ResizeShortestEdge(200))
    trainer = TrainerBase()
    trainer.model, trainer.iter, trainer.max_iter = OneBox().train(), 0, 5
    trainer.register_hooks([hook])
    with EventStorage(0) as trainer.storage:
        hook.after_step()
        hook.after_step()
        MetadataCatalog.pop(name)  # without names, classes are drawn by their number
        hook.after_step()
        images = list(trainer.storage._vis_data)
        hook._draw = lambda *_: {}["none"]  # an error: training continues
        hook.after_step()
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)
    assert caplog.text.count("Could not draw") == 1
    assert [image[0] for image in images] == ["predictions/red"] * 3 and trainer.model.training
    assert caplog.text.count("broken.png") == 1
    assert trainer.model.seen.shape == (3, 200, 300) and trainer.model.seen[2 if order == "BGR" else 0].min() == 200
    drawing = images[0][1]
    assert np.array_equal(images[1][1], drawing) and not np.array_equal(images[2][1], drawing)
    assert drawing.shape == (3, 400, 600) and drawing.dtype == np.uint8
    changed = (drawing != red.transpose(2, 0, 1)).any(0)
    assert not changed[:90].any() and not changed[:, :140].any() and changed[100:300, 148:152].any(1).mean() > 0.9
    assert tuple(drawing[:, 10, 10]) == (200, 0, 0), "colors are RGB"
