"""What a run says of itself while it goes on: speed, waiting, memory; drawings for TensorBoard; Weights & Biases."""

import importlib.util
import logging
import os
import re

from halodet.engine import load_config
from halodet.engine.progress import ProgressPrinter, Throughput, peak_memory
from halodet.engine.visualization import DrawPredictions
from halodet.errors import ConfigError

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import TrainerBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

WATCHED = ["SOLVER.MAX_ITER", "7", "TEST.VIS_PERIOD", "3", "TEST.VIS_IMAGES", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def watched(runs, train_net):
    """A run of seven iterations that is watched closely: its output folder."""
    if not (runs / "watched").exists():
        assert train_net(runs / "watched", *WATCHED) == 0
    return runs / "watched"


def test_speed_waiting_and_memory_are_in_metrics_and_in_the_log_line(watched, metrics):
    row = next(row for row in metrics(watched) if "total_loss" in row)
    # Five iterations were timed, of two images each; medians of five values are values.
    assert row["images_per_second"] == pytest.approx(2 / row["time"])
    assert 0 < row["data_share"] < 1 and row["data_share"] * row["time"] == pytest.approx(row["data_time"], rel=1)
    assert 50 < row["memory_mib"] <= peak_memory()
    log = (watched / "log.txt").read_text()
    line = next(line for line in log.splitlines() if "eta: " in line)
    said = re.search(r"lr: \S+ .*images/s: (\S+)  waiting for data: (\d+)%", line)
    assert float(said[1]) == pytest.approx(row["images_per_second"], rel=1e-3)
    assert int(said[2]) == pytest.approx(100 * row["data_share"], abs=1)
    assert re.search(r"max_mem: \d+M", line) and line.count("max_mem") == 1


def test_an_iteration_without_its_time_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    trainer = TrainerBase()
    hook = Throughput(8)
    trainer.register_hooks([hook])
    with EventStorage(0) as trainer.storage:
        hook.after_step()
        ProgressPrinter(10).write()
        assert set(trainer.storage.latest()) == {"memory_mib"} and "images/s" not in caplog.text
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


def test_tensorboard_has_drawings_of_the_same_images_each_time(watched):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    events = reader.EventAccumulator(str(watched), size_guidance={"images": 0}).Reload()
    drawn = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert len(drawn) == 2 and all(tag.startswith("predictions/") for tag in drawn)
    assert all(steps == [2, 5, 6] for steps in drawn.values()), "after each third iteration and the last one"
    assert "images_per_second" in events.Tags()["scalars"]


def test_a_run_is_the_same_with_drawings_and_without(watched, runs, train_net):
    assert train_net(runs / "unseen", *WATCHED, "TEST.VIS_PERIOD", "0") == 0
    first, second = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"] for folder in (watched, runs / "unseen")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


class OneBox(torch.nn.Module):
    """Finds one box, in the middle half of each image, in the coordinates of the image that was read."""

    def forward(self, inputs):
        assert not self.training and inputs[0]["image"].dtype == torch.float32
        self.seen = inputs[0]["image"]
        height, width = inputs[0]["height"], inputs[0]["width"]
        box = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
        found = Instances(
            (height, width), pred_boxes=Boxes(box), scores=torch.tensor([0.9]), pred_classes=torch.tensor([0])
        )
        return [{"instances": found}]


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_what_is_drawn_is_what_the_model_finds_and_unreadable_images_are_left_out(tmp_path, caplog, order):
    from PIL import Image

    red = np.zeros((400, 600, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    name = f"drawings_{order}"
    DatasetCatalog.register(name, lambda: [{"file_name": str(tmp_path / file)} for file in ("red.png", "broken.png")])
    MetadataCatalog.get(name).thing_classes = ["thing"]
    cfg = load_config(
        "quick/mask_rcnn_halo_small", ["TEST.VIS_PERIOD", "1", "INPUT.FORMAT", order, "INPUT.MIN_SIZE_TEST", "200"]
    )
    hook, trainer = DrawPredictions(cfg, name), TrainerBase()
    trainer.model, trainer.iter, trainer.max_iter = OneBox().train(), 0, 5
    trainer.register_hooks([hook])
    with EventStorage(0) as trainer.storage:
        hook.after_step()
        hook.after_step()
        images = trainer.storage._vis_data
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)
    assert [image[0] for image in images] == ["predictions/red"] * 2 and trainer.model.training
    assert caplog.text.count("broken.png") == 1
    assert trainer.model.seen.shape == (3, 200, 300) and trainer.model.seen[2 if order == "BGR" else 0].min() == 200
    drawing = images[0][1]
    assert drawing.shape == (3, 400, 600) and drawing.dtype == np.uint8
    changed = (drawing != red.transpose(2, 0, 1)).any(0)
    assert not changed[:90].any() and not changed[:, :140].any() and changed[100:300, 148:152].any(1).mean() > 0.9
    assert tuple(drawing[:, 10, 10]) == (200, 0, 0), "colours are RGB"


def test_weights_and_biases_gets_what_tensorboard_gets(tmp_path, train_net, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "run"
    keys = ["WANDB.ENABLED", "True", "WANDB.PROJECT", "try", *WATCHED]
    assert train_net(output, *keys) == 0
    assert train_net(output, *keys, "SOLVER.MAX_ITER", "9", flags=["--resume"]) == 0
    identity = (output / "wandb_id.txt").read_text()
    runs = list(output.glob("wandb/offline-run-*"))
    assert runs and all(run.name.endswith(identity) for run in runs)
    assert len(list(output.glob("wandb/offline-run-*/files/media/images/predictions/*.png"))) >= 4
    assert all(b"total_loss" in file.read_bytes() for run in runs for file in run.glob("*.wandb"))


def test_weights_and_biases_is_asked_for_only_where_it_is(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    message = "WANDB.ENABLED is True, but wandb is not installed: pip install wandb, or set it to False"
    with pytest.raises(ConfigError, match=message):
        load_config("quick/mask_rcnn_halo_small", ["WANDB.ENABLED", "True"])
    (tmp_path / "wandb").mkdir()  # as runs leave it
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        load_config("quick/mask_rcnn_halo_small", ["WANDB.ENABLED", "True"])


def test_drawing_keys_are_checked():
    with pytest.raises(ConfigError, match="TEST.VIS_PERIOD is -1 and VIS_IMAGES 4, expected 0 or more"):
        load_config("quick/mask_rcnn_halo_small", ["TEST.VIS_PERIOD", "-1"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_metrics_that_cannot_be_written_do_not_end_the_run(train_net, tmp_path, capfd):
    (tmp_path / "metrics.json").symlink_to("/dev/full")
    assert train_net(tmp_path, "DATASETS.TEST", "()") == 0
    assert (tmp_path / "model_final.pth").is_file()
    printed = "".join(capfd.readouterr())
    assert printed.count("JSONWriter cannot write (No space left on device): training goes on") == 1
