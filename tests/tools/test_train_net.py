"""The training tool from end to end on drawn scenes and on real photos, and every usage error told in one sentence."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

from halodet.data import write_shapes

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = [
    "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "5",
    "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.CHECKPOINT_PERIOD", "30",
]  # fmt: skip


def train_net(*arguments, timeout=300, **environment):
    """Run the tool as a user does; returns (exit code, everything it printed)."""
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *map(str, arguments)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}, cwd=ROOT
    )
    return run.returncode, run.stdout + run.stderr


def snapshot(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_shapes(root, "train", 4)
    return ["--train-json", root / "annotations/train.json", "--train-images", root / "train",
            "--val-json", root / "annotations/train.json", "--val-images", root / "train"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A detector overfitted to four scenes: (output folder, log)."""
    output = tmp_path_factory.mktemp("output")
    before = snapshot(data[1].parents[1])
    config = ["--config-file", "quick/mask_rcnn_halo_shapes"]
    code, log = train_net(*config, *data, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 60, *TINY)
    assert code == 0, log
    assert snapshot(data[1].parents[1]) == before, "something was written next to the user's data"
    return output, log


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_training_leaves_what_detectron2_users_expect(trained):
    output, log = trained
    for name in (
        "config.yaml",
        "last_checkpoint",
        "log.txt",
        "model_0000029.pth",
        "model_final.pth",
        "metrics.json",
        "classes.json",
    ):
        assert (output / name).is_file(), name
    assert list(output.glob("events.out.tfevents.*"))
    assert "eta:" in log and "6 classes: circle, square, triangle, star, ring, cross" in log
    assert [c["name"] for c in json.loads((output / "classes.json").read_text())][:2] == ["circle", "square"]


def test_it_learns(trained):
    rows = metrics(trained[0])
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert rows[-1]["bbox/AP50"] > 1 and "segm/AP" in rows[-1]


def test_eval_only_repeats_the_evaluation_exactly(trained, data, tmp_path):
    output, _ = trained
    expected = json.loads((output / "inference/coco_instances_results.json").read_text())
    assert len(expected) > 10 and all(min(r["bbox"][2:]) > 0 for r in expected), (
        "degenerate detections would compare as equal"
    )
    config = ["--config-file", output / "config.yaml", "--eval-only"]
    code, log = train_net(*config, *data[4:], "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", output / "model_final.pth")
    assert code == 0, log
    assert json.loads((tmp_path / "inference/coco_instances_results.json").read_text()) == expected
    final = metrics(output)[-1]
    assert f"{final['bbox/AP']:.4f},{final['bbox/AP50']:.4f}" in log


def test_resume_goes_on_from_the_last_checkpoint(trained, data):
    output, _ = trained
    code, log = train_net(
        "--config-file", output / "config.yaml", "--resume", *data, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 62
    )
    assert code == 0, log
    assert "Starting training from iteration 60" in log
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 61


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config given"),
        (
            ["--config-file", "mask_rcnn_halo_h4"],
            "coco_2017_train was looked for at .* which does not exist: put COCO there",
        ),
        (["--config-file", "mask_rcnn_halo_h4", "--num-gpus", "64"], "--num-gpus is 64"),
        (
            ["--config-file", "mask_rcnn_halo_h4", "DATASETS.TRAIN", "('coco_2017_tran',)"],
            "no dataset 'coco_2017_tran': the nearest",
        ),
        (["--config-file", "quick/mask_rcnn_halo_shapes", "--eval-only"], "--eval-only needs trained weights"),
        (["--config-file", "mask_rcnn_halo_h4", "--train-json", "gone.json"], "belong together"),
        (["--config-file", "mask_rcnn_halo_h4", "--train-json", "gone.json", "--train-images", "."], "gone.json"),
    ],
)
def test_usage_errors_are_one_sentence_and_exit_code_2(arguments, message, tmp_path):
    code, log = train_net(
        *arguments, *(["OUTPUT_DIR", tmp_path] if arguments else []), DETECTRON2_DATASETS=str(tmp_path)
    )
    assert code == 2, log
    assert "Traceback" not in log and re.search(message, log.replace("\n", " ")), log


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["strange.pth", "code.pkl"])
def test_weights_that_do_not_fit_or_bring_code_are_not_trained(name, data, tmp_path):
    torch.save({"model": {"encoder.weight": torch.ones(3, 3)}}, tmp_path / "strange.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"model": {"a": _Payload(str(tmp_path / "marker"))}}))
    code, log = train_net(
        "--config-file",
        "quick/mask_rcnn_halo_small",
        *data[:4],
        "OUTPUT_DIR",
        tmp_path / "out",
        "MODEL.WEIGHTS",
        tmp_path / name,
    )
    assert code == 2 and "Traceback" not in log and name in log, log
    assert (
        not (tmp_path / "marker").exists()
        and not list((tmp_path / "out").glob("*.pth"))
        and "Starting training" not in log
    )


def test_real_photos_train_and_evaluate(tmp_path):
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute()
    if not (root / "coco/annotations/instances_val2017.json").is_file():
        pytest.skip(f"COCO is not in {root}")
    annotations = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    few = annotations["images"][:6]
    annotations["images"], ids = few, {image["id"] for image in few}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in ids]
    (tmp_path / "few.json").write_text(json.dumps(annotations))
    images = root / "coco/val2017"
    small = [
        "INPUT.MIN_SIZE_TRAIN",
        "(128,)",
        "INPUT.MIN_SIZE_TEST",
        128,
        "SOLVER.IMS_PER_BATCH",
        2,
        "DATALOADER.NUM_WORKERS",
        0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        0.0,
    ]  # two iterations from random weights find nothing above the usual one
    code, log = train_net(
        "--config-file", "mask_rcnn_halo_h0", "--train-json", tmp_path / "few.json", "--train-images", images,
        "--val-json", tmp_path / "few.json", "--val-images", images, "OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 2, *small,
    )  # fmt: skip
    assert code == 0, log
    assert "80 classes" in log and "Evaluation results for bbox" in log
    assert (tmp_path / "out/model_final.pth").is_file()
