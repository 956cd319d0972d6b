"""tools/train_net.py in process: train, evaluate and resume on drawn scenes and real photos, and usage errors."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import CreatesFile, read_metrics, registered

TINY = [
    "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "2",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "TEST.DETECTIONS_PER_IMAGE", "30",
    "SOLVER.WARMUP_ITERS", "5",
    "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.CHECKPOINT_PERIOD", "30", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def printed(capsys):
    return "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Output folder of the run that the tests below share."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def trained(folder, train_net, scenes, capsys):
    """A detector overfitted to four scenes: its output folder and, once, its log."""
    if not (folder / "model_final.pth").is_file():
        data = Path(scenes[1].partition("=")[2]).parent
        before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
        assert train_net(folder, "SOLVER.MAX_ITER", 60, tiny=TINY) == 0
        assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before, "written beside the user's data"
        (folder / "printed.txt").write_text(printed(capsys))
    return folder


@pytest.mark.slow
class TestRun:
    def test_training_writes_what_detectron2_users_expect(self, trained):
        names = ("config.yaml", "last_checkpoint", "log.txt", "model_0000029.pth", "metrics.json", "classes.json")
        assert all((trained / name).is_file() for name in names) and list(trained.glob("events.out.tfevents.*"))
        log = (trained / "printed.txt").read_text()
        assert "eta:" in log and "circle, square, triangle, star, ring, cross" in log
        assert [c["name"] for c in json.loads((trained / "classes.json").read_text())][:2] == ["circle", "square"]

    def test_it_learns(self, trained):
        rows = read_metrics(trained)
        losses = [row["total_loss"] for row in rows if "total_loss" in row]
        assert losses[-1] < 0.8 * losses[0]
        assert rows[-1]["bbox/AP50"] > 1 and "segm/AP" in rows[-1]

    def test_eval_only_repeats_the_evaluation_exactly(self, trained, train_net, tmp_path, capsys):
        expected = json.loads((trained / "inference/coco_instances_results.json").read_text())
        assert len(expected) > 10 and all(min(r["bbox"][2:]) > 0 for r in expected), "degenerate boxes compare as equal"
        weights = ["MODEL.WEIGHTS", trained / "model_final.pth"]
        assert train_net(tmp_path, *weights, flags=["--eval-only"], config=trained / "config.yaml", tiny=()) == 0
        assert json.loads((tmp_path / "inference/coco_instances_results.json").read_text()) == expected
        final = read_metrics(trained)[-1]
        assert f"{final['bbox/AP']:.4f},{final['bbox/AP50']:.4f}" in printed(capsys)

    def test_resume_continues_after_the_last_checkpoint(self, trained, train_net, capsys):
        config = trained / "config.yaml"
        assert train_net(trained, "SOLVER.MAX_ITER", 62, flags=["--resume"], config=config, tiny=()) == 0
        assert "Starting training from iteration 60" in printed(capsys)
        assert (trained / "last_checkpoint").read_text() == "model_final.pth"
        assert torch.load(trained / "model_final.pth", weights_only=True)["iteration"] == 61


@pytest.mark.parametrize(
    ("flags", "opts", "named"),
    [
        (["--config-file="], [], "--config-file"),
        (["--config-file=mask_rcnn_halo_h4"], ["DATASETS.TRAIN", "('gone_train',)"], "gone_train"),
        (["--config-file=mask_rcnn_halo_h4", "--num-gpus=64"], [], "--num-gpus=64"),
        (["--config-file=mask_rcnn_halo_h4"], ["DATASETS.TRAIN", "('coco_2017_tran',)"], "coco_2017_tran"),
        (["--config-file=mask_rcnn_halo_h4"], ["SOLVER.NO_KEY", "3"], "SOLVER.NO_KEY"),
        (["--config-file=quick/mask_rcnn_halo_shapes", "--eval-only"], [], "--eval-only"),
        (["--config-file=mask_rcnn_halo_h4", "--train-json=gone.json"], [], "--train-json"),
        (["--config-file=mask_rcnn_halo_h4", "--train-json=gone.json", "--train-images=."], [], "gone.json"),
    ],
)
def test_a_usage_error_is_one_message_and_exit_code_2(flags, opts, named, tool, tmp_path, capsys):
    with registered("gone_train", tmp_path / "gone.json", tmp_path):
        assert tool([*flags, "OUTPUT_DIR", str(tmp_path / "out"), *opts]) == 2
    log = printed(capsys)
    assert log.count("ERROR") == 1 and named in log and "Traceback" not in log, log


def test_weights_that_do_not_fit_or_run_code_are_not_trained(train_net, tmp_path, capsys):
    torch.save({"model": {"encoder.weight": torch.ones(3, 3)}}, tmp_path / "strange.pth")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps({"model": {"a": CreatesFile(tmp_path / "marker")}}))
    for name in ("strange.pth", "code.pkl"):
        assert train_net(tmp_path / "out", "MODEL.WEIGHTS", tmp_path / name) == 2
        log = printed(capsys)
        assert name in log and "Traceback" not in log and "Starting training" not in log
    assert not (tmp_path / "marker").exists() and not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.slow
def test_real_photos_train_and_evaluate(tool, tmp_path, capsys):
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute()
    if not (root / "coco/annotations/instances_val2017.json").is_file():
        pytest.skip(f"COCO is not in {root}")
    annotations = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    annotations["images"] = annotations["images"][:3]
    ids = {image["id"] for image in annotations["images"]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in ids]
    (tmp_path / "few.json").write_text(json.dumps(annotations))
    images, few = root / "coco/val2017", tmp_path / "few.json"
    data = [f"--train-json={few}", f"--train-images={images}", f"--val-json={few}", f"--val-images={images}"]
    # Two iterations from random weights find nothing above the usual score threshold.
    small = [
        "TEST.DETECTIONS_PER_IMAGE", "5", "INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", "128",
        "MODEL.HALONET.BASE_WIDTH", "16", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
        "MODEL.RPN.POST_NMS_TOPK_TEST", "50",
    ]  # fmt: skip
    output = ["OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", "2"]
    assert tool(["--config-file=mask_rcnn_halo_h0", *data, *output, *small]) == 0
    log = printed(capsys)
    assert "80 classes" in log and "Evaluation results for bbox" in log and (tmp_path / "out/model_final.pth").is_file()
