"""tools/demo.py: end to end, and invalid arguments."""

import json
import os
import subprocess
import sys

from halodet.data.classes import write_classes

import exported_models
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from helpers import ROOT, load_tool
from PIL import Image

CLASSES = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
CONFIG = """
VERSION: 2
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: RetinaNet
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res4, res5]}
  FPN: {IN_FEATURES: [res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[32, 40, 50]]}
  RETINANET: {NUM_CLASSES: 2, NUM_CONVS: 1, IN_FEATURES: [p4, p5]}
INPUT: {MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 160}
"""


@pytest.fixture
def photos(tmp_path):
    """A noise image and a truncated one."""
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A config, weights that find something, and the class list that training leaves beside them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(CONFIG)
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    DetectionCheckpointer(model, str(folder)).save("model_final")
    write_classes(folder / "classes.json", CLASSES)
    return folder


def test_the_tool_from_end_to_end(run_folder, photos, tmp_path):
    options = [
        "--config-file",
        run_folder / "config.yaml",
        "--output",
        tmp_path / "out" / "deep",
        "--confidence-threshold",
        "0.2",
    ]
    weights = ["--opts", "MODEL.WEIGHTS", run_folder / "model_final.pth"]
    command = [sys.executable, ROOT / "tools/demo.py", *options, "--input", photos, *weights]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "1 drawn, 1 failed" in done.stdout and "broken.png" in done.stderr and "Traceback" not in done.stderr
    assert "2/2" in done.stderr  # the progress bar
    coco = json.loads((tmp_path / "out" / "deep" / "detections.json").read_text())
    assert coco["categories"] == CLASSES and len(coco["images"]) == 1
    assert coco["annotations"] and all(
        a["score"] >= 0.2 and a["category_id"] in (17, 18) and a["area"] > 0 for a in coco["annotations"]
    )
    assert (tmp_path / "out" / "deep" / "noise.png").is_file()


def test_keys_that_only_training_uses_are_not_validated(run_folder, photos, tmp_path):
    keys = [
        "SOLVER.OPTIMIZER_NAME",
        "none",
        "SOLVER.IMS_PER_BATCH",
        0,
        "DATALOADER.NUM_WORKERS",
        -1,
        "DATASETS.TRAIN",
        "('none',)",
    ]
    words = ["--config-file", run_folder / "config.yaml", "--input", photos / "noise.png", "--output", tmp_path / "out"]
    weights = ["--opts", "MODEL.WEIGHTS", run_folder / "model_final.pth"]
    assert load_tool("demo").main([str(word) for word in (*words, *weights, *keys)]) == 0


def test_mistakes_of_use_end_with_2_and_one_sentence(run_folder, photos, tmp_path, capsys):
    demo = load_tool("demo")
    (tmp_path / "file").touch()
    good = {
        "--config-file": run_folder / "config.yaml",
        "--input": photos / "noise.png",
        "--output": tmp_path / "out",
        "--opts": ["MODEL.WEIGHTS", run_folder / "model_final.pth"],
    }
    mistakes = [
        ({"--config-file": tmp_path / "none.yaml"}, "none.yaml"),
        ({"--input": tmp_path / "none.jpg"}, "none.jpg"),
        ({"--output": tmp_path / "file"}, "--output"),
        ({"--opts": []}, "MODEL.WEIGHTS"),
        ({"--opts": ["MODEL.WEIGHTS", tmp_path / "none.pth"]}, "none.pth"),
        ({"--opts": [*good["--opts"], "MODEL.RETINANET.NUM_CLASSES", "3"]}, "classes.json"),
        ({"--opts": ["MODEL.WEIGHT", "x"]}, "MODEL.WEIGHT"),
        ({"--opts": [*good["--opts"], "MODEL.FPN.IN_FEATURES", "['res9']"]}, "res9"),
    ]
    for change, reason in mistakes:
        words = []
        for option, value in {**good, **change}.items():
            words += [option, *(value if isinstance(value, list) else [value])]
        assert demo.main([str(word) for word in words]) == 2
        printed = capsys.readouterr()
        assert reason in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--config-file", "x", "--input", "x", "--output", "x", "--confidence-threshold", "1.5"])
    assert stopped.value.code == 2 and "1.5" in capsys.readouterr().err


def test_a_batch_writes_the_files_of_single_images(run_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(5):
        noise = np.random.default_rng(index).integers(0, 256, (60, 90 - index % 2, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{index}.png")
    found = []
    for size in (1, 3):
        options = ["--config-file", run_folder / "config.yaml", "--input", tmp_path / "in", "--batch-size", size]
        options += ["--output", tmp_path / f"out{size}", "--confidence-threshold", "0.2"]
        weights = ["--opts", "MODEL.WEIGHTS", run_folder / "model_final.pth"]
        assert load_tool("demo").main([str(word) for word in (*options, *weights)]) == 0
        found.append(json.loads((tmp_path / f"out{size}" / "detections.json").read_text()))
    assert found[0]["images"] == found[1]["images"] and found[0]["annotations"]
    for one, three in zip(found[0]["annotations"], found[1]["annotations"], strict=True):
        assert (one["image_id"], one["category_id"]) == (three["image_id"], three["category_id"])
        assert one["bbox"] == pytest.approx(three["bbox"], abs=1e-2)


def test_an_exported_model_is_run_without_pytorch(photos, tmp_path):
    pytest.importorskip("onnxruntime")
    model = exported_models.write_onnx(tmp_path / "model.onnx", exported_models.metadata(score_threshold=0.6))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in 'torch torchvision detectron2 fvcore iopath pycocotools matplotlib omegaconf yaml'.split():\n"
        "    sys.modules[name] = None\n"
    )
    options = ["--model", model, "--input", photos, "--output", tmp_path / "out", "--batch-size", 4]
    command = [sys.executable, ROOT / "tools/demo.py", *options, "--confidence-threshold", 0.5]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "1 drawn, 1 failed" in done.stdout and "broken.png" in done.stderr and "Traceback" not in done.stderr
    assert "score threshold 0.6" in done.stderr and "images/s" in done.stderr
    coco = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert coco["categories"] == CLASSES and [a["category_id"] for a in coco["annotations"]] == [18, 17]
    assert (tmp_path / "out" / "noise.png").is_file()


def test_mistakes_with_an_exported_model(photos, tmp_path, capsys):
    demo = load_tool("demo")
    paths = ["--input", str(photos / "noise.png"), "--output", str(tmp_path / "out")]
    assert demo.main(["--model", str(tmp_path / "none.onnx"), *paths]) == 2
    printed = capsys.readouterr()
    assert "none.onnx" in printed.err and printed.err.count("\n") == 1 and not (tmp_path / "out").exists()
    model = str(exported_models.write_onnx(tmp_path / "model.onnx", exported_models.metadata()))
    for words, reason in (
        ([], "--config-file --model"),
        (["--model", model, "--config-file", "x"], "--config-file: not allowed with argument --model"),
        (["--model", model, "--import", "x"], "--import: not allowed with argument --model"),
        (["--model", model, "--opts", "MODEL.WEIGHTS", "x"], "--opts: not allowed with argument --model"),
        (["--model", model, "--batch-size", "0"], "--batch-size: 0 is invalid: expected a positive integer"),
    ):
        with pytest.raises(SystemExit) as stopped:
            demo.main([*paths, *words])
        assert stopped.value.code == 2 and reason in capsys.readouterr().err
