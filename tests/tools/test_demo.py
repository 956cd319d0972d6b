"""tools/demo.py: which files it takes, what it writes, and how it ends."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from halodet.inference import PredictorError, write_classes

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "demo.py"
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


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("halodet_demo", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HandMade:
    """Stands in for Predictor: one dog with a mask at 0.9, one cat at 0.4, in every image."""

    classes = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]

    def __call__(self, image):
        height, width = image.shape[:2]
        boxes = torch.tensor([[2.0, 1.0, 6.0, 4.0], [0.0, 0.0, 3.0, 3.0]])
        found = Instances(
            (height, width), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.4]), pred_classes=torch.tensor([1, 0])
        )
        found.pred_masks = torch.zeros(2, height, width, dtype=torch.bool)
        found.pred_masks[0, 1:4, 2:6] = True
        return found


@pytest.fixture
def photos(tmp_path):
    """Two folders with images of the same names, a broken image and files that are no images."""
    for name in (
        "a/x.jpg",
        "b/x.jpg",
        "c/X.JPG",
        "a/scan.tif",
        "a/with space & ünï 猫.png",
        "a/deep/x.png",
        "a/no_suffix",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), "red").save(path, format={".tif": "tiff", ".png": "png"}.get(path.suffix, "jpeg"))
    (tmp_path / "in" / "a" / "broken.jpg").write_bytes((tmp_path / "in" / "a" / "x.jpg").read_bytes()[:200])
    for name in ("notes.txt", "coco.json", ".hidden.jpg"):
        (tmp_path / "in" / "a" / name).write_text("{}")
    return tmp_path / "in"


def found_in(demo, inputs, output="nowhere"):
    return [os.path.basename(path) for path in demo.find_images([str(path) for path in inputs], str(output))]


def test_folders_are_searched_and_leave_out_what_is_no_image(demo, photos):
    assert found_in(demo, [photos / "a"]) == [
        "broken.jpg",
        "no_suffix",
        "scan.tif",
        "with space & ünï 猫.png",
        "x.jpg",
        "x.png",
    ]


def test_named_files_are_always_taken_and_each_once(demo, photos):
    inputs = [photos / "a" / "notes.txt", photos / "a" / "x.jpg", photos / "b" / ".." / "a" / "x.jpg"]
    assert found_in(demo, inputs) == ["notes.txt", "x.jpg"]


def test_patterns_are_expanded_unless_a_file_has_that_name(demo, photos):
    assert found_in(demo, [photos / "**" / "*.jpg"]) == ["broken.jpg", "x.jpg", "x.jpg"]
    (photos / "a" / "[x].png").write_bytes(b"")
    assert found_in(demo, [photos / "a" / "[x].png"]) == ["[x].png"]


def test_drawings_of_an_earlier_run_are_no_input_and_inputs_are_never_overwritten(demo, photos):
    assert "x.png" not in found_in(demo, [photos / "a"], photos / "a" / "deep")
    for inputs in ([photos / "a" / "x.jpg"], [photos / "a"]):
        with pytest.raises(demo.UsageError, match="could replace it"):
            found_in(demo, inputs, photos / "b" / ".." / "a")


def test_an_input_that_matches_nothing_is_a_usage_error(demo, photos):
    (photos / "empty").mkdir()
    for name in ("none.jpg", "*.none", "empty"):
        with pytest.raises(demo.UsageError, match=name.replace("*", r"\*")):
            found_in(demo, [photos / "a", photos / name])


def test_every_image_is_drawn_under_its_own_name_and_the_broken_one_reported(demo, photos, capsys):
    output = photos.parent / "out"
    output.mkdir()
    files = demo.find_images([str(photos)], str(output))
    assert demo.run(HandMade(), files, str(output), 0.5) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("7 drawn, 1 refused")
    assert printed.err.count("broken.jpg") == 1
    drawings = {"x.jpg", "x_2.jpg", "X_3.JPG", "scan.tif.png", "with space & ünï 猫.png", "x.png", "no_suffix.png"}
    assert {path.name for path in output.iterdir()} == drawings | {"detections.json"}
    coco = json.loads((output / "detections.json").read_text())
    assert {image["drawing"] for image in coco["images"]} == drawings
    for image in coco["images"]:
        assert (image["width"], image["height"]) == (12, 8) and os.path.isfile(image["file_name"])
        drawing = np.asarray(Image.open(output / image["drawing"]).convert("RGB"))
        # The red of the image, at four times its size.
        assert drawing.shape == (32, 48, 3) and drawing[30, 46, 0] > 200 and drawing[30, 46, 2] < 60


def test_detections_are_coco_and_those_above_the_threshold(demo, photos, tmp_path):
    assert demo.run(HandMade(), [str(photos / "a" / "x.jpg"), str(photos / "b" / "x.jpg")], str(tmp_path), 0.5) == 0
    coco = json.loads((tmp_path / "detections.json").read_text())
    assert coco["categories"] == HandMade.classes
    assert [image["id"] for image in coco["images"]] == [1, 2]
    assert [(a["id"], a["image_id"], a["category_id"], a["iscrowd"]) for a in coco["annotations"]] == [
        (1, 1, 18, 0),
        (2, 2, 18, 0),
    ]
    annotation = coco["annotations"][0]
    assert annotation["bbox"] == [2, 1, 4, 3] and annotation["area"] == 12 and annotation["score"] == pytest.approx(0.9)
    assert mask_util.decode(annotation["segmentation"]).sum() == 12
    demo.run(HandMade(), [str(photos / "a" / "x.jpg")], str(tmp_path), 0.4)
    assert len(json.loads((tmp_path / "detections.json").read_text())["annotations"]) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left"), 1),
        (PredictorError("No."), 2),
        (ZeroDivisionError(), None),
    ],
)
def test_what_was_found_is_kept_whatever_stops_the_run(demo, photos, tmp_path, capsys, error, code):
    class Stops(HandMade):
        calls = 0

        def __call__(self, image):
            self.calls += 1
            if self.calls == 2:
                raise error
            return super().__call__(image)

    files = [str(photos / "a" / name) for name in ("x.jpg", "scan.tif", "deep/x.png")]
    if code is None:
        with pytest.raises(ZeroDivisionError):
            demo.run(Stops(), files, str(tmp_path), 0.5)
    else:
        assert demo.run(Stops(), files, str(tmp_path), 0.5) == code
        assert "1 drawn, 0 refused, 2 not reached" in capsys.readouterr().out
    coco = json.loads((tmp_path / "detections.json").read_text())
    assert len(coco["images"]) == 1 and len(coco["annotations"]) == 1


def run_tool(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, words)], capture_output=True, text=True, env=environment, timeout=120
    )


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
    write_classes(folder / "classes.json", HandMade.classes)
    return folder


def test_the_tool_from_end_to_end(run_folder, photos, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "a" / "noise.png")
    options = [
        "--config-file",
        run_folder / "config.yaml",
        "--output",
        tmp_path / "out" / "deep",
        "--confidence-threshold",
        "0.2",
    ]
    weights = ["--opts", "MODEL.WEIGHTS", run_folder / "model_final.pth"]
    done = run_tool(*options, "--input", photos / "a" / "noise.png", photos / "a" / "broken.jpg", *weights)
    assert done.returncode == 1, done.stderr
    assert (
        "1 drawn, 1 refused" in done.stdout
        and "broken.jpg cannot be read" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert "2/2" in done.stderr  # the progress bar
    coco = json.loads((tmp_path / "out" / "deep" / "detections.json").read_text())
    assert coco["categories"] == HandMade.classes and len(coco["images"]) == 1
    assert coco["annotations"] and all(
        a["score"] >= 0.2 and a["category_id"] in (17, 18) and a["area"] > 0 for a in coco["annotations"]
    )
    assert (tmp_path / "out" / "deep" / "noise.png").is_file()


def test_mistakes_of_use_end_with_2_and_one_sentence(demo, run_folder, photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    good = {
        "--config-file": run_folder / "config.yaml",
        "--input": photos / "a" / "x.jpg",
        "--output": tmp_path / "out",
        "--opts": ["MODEL.WEIGHTS", run_folder / "model_final.pth"],
    }
    mistakes = [
        ({"--config-file": tmp_path / "none.yaml"}, "none.yaml"),
        ({"--input": tmp_path / "none.jpg"}, "matches no file"),
        ({"--output": tmp_path / "file"}, "cannot be made a folder"),
        ({"--opts": []}, "MODEL.WEIGHTS is empty"),
        ({"--opts": ["MODEL.WEIGHTS", tmp_path / "none.pth"]}, "not a file"),
        ({"--opts": [*good["--opts"], "MODEL.RETINANET.NUM_CLASSES", "3"]}, "names 2 classes but the model has 3"),
        ({"--opts": ["MODEL.WEIGHT", "x"]}, "MODEL.WEIGHT"),
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
    assert stopped.value.code == 2 and "1.5 is not between 0 and 1" in capsys.readouterr().err
