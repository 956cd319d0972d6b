"""Writers in a real run: the progress line, metrics.json, TensorBoard and Weights & Biases."""

import os
import re

import pytest
from helpers import assert_same_tensors
from small_run import VAL, make_trainer

VISUALIZE = {"SOLVER.MAX_ITER": 7, "TEST.VIS_PERIOD": 3, "TEST.VIS_IMAGES": 2, "DATASETS.TEST": f"('{VAL}',)"}
VISUALIZE |= {"TEST.EVAL_PERIOD": 0}


def train(folder, *options):
    """Train without the evaluation at the end; returns the trainer."""
    trainer = make_trainer(folder, VISUALIZE, *options)
    trainer.test = lambda *_: {}
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def visualized(cache, shapes, tmp_path_factory, caplog):
    """The output folder, the trainer and the log of a run of seven iterations with visualization."""
    if not cache:
        caplog.set_level("INFO")
        folder = tmp_path_factory.mktemp("visualized")
        cache.update(folder=folder, trainer=train(folder), log=caplog.text)
    return cache


def test_throughput_is_in_metrics_and_in_the_progress_line(visualized, metrics):
    row = next(row for row in metrics(visualized["folder"]) if "total_loss" in row)
    # Five iterations of two images were timed; the median of five values is one of them.
    assert row["images_per_second"] == pytest.approx(2 / row["time"])
    assert 0 < row["data_share"] < 1 and row["memory_mib"] > 50
    line = next(line for line in visualized["log"].splitlines() if "eta: " in line)
    found = re.search(r"lr: \S+ .*images/s: (\S+)  waiting for data: (\d+)%", line)
    assert float(found[1]) == pytest.approx(row["images_per_second"], rel=1e-3)
    assert int(found[2]) == pytest.approx(100 * row["data_share"], abs=1)
    assert line.count("max_mem") == 1 and re.search(r"max_mem: \d+M", line)


def test_tensorboard_shows_the_same_images_each_time(visualized):
    reason = "tensorboard is not installed"
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    events = reader.EventAccumulator(str(visualized["folder"]), size_guidance={"images": 0}).Reload()
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert len(steps) == 2 and all(tag.startswith("predictions/") for tag in steps)
    assert all(found == [2, 5, 6] for found in steps.values()), "every third iteration and the last one"
    assert "images_per_second" in events.Tags()["scalars"]


def test_visualization_does_not_change_training(visualized, tmp_path):
    plain = train(tmp_path, {"TEST.VIS_PERIOD": 0})
    assert_same_tensors(plain.model.state_dict(), visualized["trainer"].model.state_dict())


def test_weights_and_biases_gets_scalars_and_images(shapes, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = {"WANDB.ENABLED": True, "WANDB.PROJECT": "try"}
    train(tmp_path, wandb)
    resumed = make_trainer(tmp_path, VISUALIZE, wandb, {"SOLVER.MAX_ITER": 9})
    resumed.resume_or_load(resume=True)
    resumed.train()
    run_id = (tmp_path / "wandb_id.txt").read_text()
    runs = list(tmp_path.glob("wandb/offline-run-*"))
    assert runs and all(run.name.endswith(run_id) for run in runs)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/predictions/*.png"))) >= 4
    assert all(b"total_loss" in file.read_bytes() for run in runs for file in run.glob("*.wandb"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_for_metrics_does_not_end_the_run(shapes, tmp_path, caplog):
    (tmp_path / "metrics.json").symlink_to("/dev/full")
    train(tmp_path, {"SOLVER.MAX_ITER": 2})
    assert (tmp_path / "model_final.pth").is_file()
    assert caplog.text.count("JSONWriter cannot write (No space left on device)") == 1
