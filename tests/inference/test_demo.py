"""halodet.inference.demo: which files are found, what is written, and the exit codes."""

import json
import os

from halodet.errors import ConfigError
from halodet.inference import demo

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO


class FixedPredictor:
    """Finds one dog with a mask at score 0.9 and one cat at 0.4 in every image."""

    classes = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    stuff_classes = []

    def predict(self, image):
        height, width = image.shape[:2]
        boxes = torch.tensor([[2.0, 1.0, 6.0, 4.0], [0.0, 0.0, 3.0, 3.0]])
        found = Instances(
            (height, width), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.4]), pred_classes=torch.tensor([1, 0])
        )
        found.pred_masks = torch.zeros(2, height, width, dtype=torch.bool)
        found.pred_masks[0, 1:4, 2:6] = True
        return {"instances": found}


@pytest.fixture
def photos(tmp_path):
    """Folders with images of the same names, a broken image and files that are not images."""
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


def found_in(inputs, output="nowhere"):
    return [os.path.basename(path) for path in demo.find_images([str(path) for path in inputs], str(output))]


def test_folders_are_searched_and_leave_out_what_is_no_image(photos):
    assert found_in([photos / "a"]) == [
        "broken.jpg",
        "no_suffix",
        "scan.tif",
        "with space & ünï 猫.png",
        "x.jpg",
        "x.png",
    ]


def test_named_files_are_always_taken_and_each_once(photos):
    inputs = [photos / "a" / "notes.txt", photos / "a" / "x.jpg", photos / "b" / ".." / "a" / "x.jpg"]
    assert found_in(inputs) == ["notes.txt", "x.jpg"]


def test_patterns_are_expanded_unless_a_file_has_that_name(photos):
    assert found_in([photos / "**" / "*.jpg"]) == ["broken.jpg", "x.jpg", "x.jpg"]
    (photos / "a" / "[x].png").write_bytes(b"")
    assert found_in([photos / "a" / "[x].png"]) == ["[x].png"]


def test_drawings_of_an_earlier_run_are_no_input_and_inputs_are_never_overwritten(photos):
    assert "x.png" not in found_in([photos / "a"], photos / "a" / "deep")
    for inputs in ([photos / "a" / "x.jpg"], [photos / "a"]):
        with pytest.raises(ConfigError, match="--output"):
            found_in(inputs, photos / "b" / ".." / "a")


def test_an_input_that_matches_nothing_is_a_usage_error(photos):
    (photos / "empty").mkdir()
    for name in ("none.jpg", "*.none", "empty"):
        with pytest.raises(ConfigError, match=name.replace("*", r"\*")):
            found_in([photos / "a", photos / name])


def test_every_image_is_drawn_under_its_own_name_and_the_broken_one_reported(photos, capsys):
    output = photos.parent / "out"
    output.mkdir()
    files = demo.find_images([str(photos)], str(output))
    assert demo.draw_images(FixedPredictor(), files, str(output), threshold=0.5) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("7 drawn, 1 failed")
    assert printed.err.count("broken.jpg") == 1
    drawings = {"x.jpg", "x_2.jpg", "X_3.JPG", "scan.tif.png", "with space & ünï 猫.png", "x.png", "no_suffix.png"}
    assert {path.name for path in output.iterdir()} == drawings | {"detections.json"}
    coco = json.loads((output / "detections.json").read_text())
    assert {image["drawing"] for image in coco["images"]} == drawings
    assert coco["info"]["root"] == str(photos)
    for image in coco["images"]:
        assert (image["width"], image["height"]) == (12, 8) and not os.path.isabs(image["file_name"])
        assert os.path.isfile(os.path.join(coco["info"]["root"], image["file_name"]))
        drawing = np.asarray(Image.open(output / image["drawing"]).convert("RGB"))
        # The red of the image, at four times its size.
        assert drawing.shape == (32, 48, 3) and drawing[30, 46, 0] > 200 and drawing[30, 46, 2] < 60


def test_file_names_do_not_depend_on_the_working_directory(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos / "a")
    files = ["x.jpg", "../b/x.jpg"]
    for absolute_paths, root in ((False, str(photos)), (True, "")):
        demo.draw_images(FixedPredictor(), files, str(tmp_path), threshold=0.5, absolute_paths=absolute_paths)
        path = tmp_path / "detections.json"
        coco = json.loads(path.read_text())
        assert coco["info"]["root"] == root
        names = [os.path.join(root, image["file_name"]) for image in coco["images"]]
        assert names == [str(photos / "a/x.jpg"), str(photos / "b/x.jpg")]
        assert [image["id"] for image in COCO(str(path)).loadImgs([1, 2])] == [1, 2]


def test_detections_are_coco_and_those_above_the_threshold(photos, tmp_path):
    assert (
        demo.draw_images(
            FixedPredictor(), [str(photos / "a" / "x.jpg"), str(photos / "b" / "x.jpg")], str(tmp_path), threshold=0.5
        )
        == 0
    )
    coco = json.loads((tmp_path / "detections.json").read_text())
    assert coco["categories"] == FixedPredictor.classes
    assert [image["id"] for image in coco["images"]] == [1, 2]
    assert [(a["id"], a["image_id"], a["category_id"], a["iscrowd"]) for a in coco["annotations"]] == [
        (1, 1, 18, 0),
        (2, 2, 18, 0),
    ]
    annotation = coco["annotations"][0]
    assert annotation["bbox"] == [2, 1, 4, 3] and annotation["area"] == 12 and annotation["score"] == pytest.approx(0.9)
    assert mask_util.decode(annotation["segmentation"]).sum() == 12
    demo.draw_images(FixedPredictor(), [str(photos / "a" / "x.jpg")], str(tmp_path), threshold=0.4)
    assert len(json.loads((tmp_path / "detections.json").read_text())["annotations"]) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left"), 1),
        (ConfigError("No."), 2),
        (ZeroDivisionError(), None),
    ],
)
def test_what_was_found_is_kept_whatever_stops_the_run(photos, tmp_path, capsys, error, code):
    class Stops(FixedPredictor):
        calls = 0

        def predict(self, image):
            self.calls += 1
            if self.calls == 2:
                raise error
            return super().predict(image)

    files = [str(photos / "a" / name) for name in ("x.jpg", "scan.tif", "deep/x.png")]
    if code is None:
        with pytest.raises(ZeroDivisionError):
            demo.draw_images(Stops(), files, str(tmp_path), threshold=0.5)
    else:
        assert demo.draw_images(Stops(), files, str(tmp_path), threshold=0.5) == code
        assert "1 drawn, 0 failed, 2 not processed" in capsys.readouterr().out
    coco = json.loads((tmp_path / "detections.json").read_text())
    assert len(coco["images"]) == 1 and len(coco["annotations"]) == 1
