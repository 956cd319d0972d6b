"""halodet.inference.demo: which files are found, what is written, and the exit codes."""

import json
import os
import signal
import time

from halodet.errors import ConfigError, ImageError
from halodet.inference import demo
from halodet.inference.export_metadata import PredictionError

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


class BatchPredictor(FixedPredictor):
    """Finds in each image as many dogs as the image has columns modulo 7; remembers the sizes of its batches."""

    def __init__(self):
        self.batches = []

    def predict(self, image):
        return self.predict_batch([image])[0]

    def predict_batch(self, images):
        self.batches.append(len(images))
        found = [super(BatchPredictor, self).predict(image)["instances"] for image in images]
        return [{"instances": f[[0] * (i.shape[1] % 7)]} for f, i in zip(found, images, strict=True)]


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
    (photos / "clip.MP4").write_bytes(b"video")
    assert "clip.MP4" not in found_in([photos])
    with pytest.raises(ConfigError, match="clip.MP4 .* Fix: --video"):
        found_in([photos / "clip.MP4"])
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


def test_that_nothing_is_found_is_said(photos, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    assert demo.draw_images(FixedPredictor(), [str(photos / "a" / "x.jpg")], str(output), threshold=0.95) == 0
    printed = capsys.readouterr().out
    assert "1 drawn, 0 failed, 0 objects" in printed and "0.95" in printed.splitlines()[1]


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


@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
def test_results_do_not_depend_on_the_batch_size(tmp_path, batch_size):
    files = []
    for index in range(11):
        files.append(str(tmp_path / f"{index % 4}" / f"{index // 4}.tif"))
        os.makedirs(os.path.dirname(files[-1]), exist_ok=True)
        Image.new("RGB", (20 + index, 30), "red").save(files[-1])
    (tmp_path / "1" / "1.tif").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    predictor = BatchPredictor()
    assert demo.draw_images(predictor, files, str(tmp_path / "out"), threshold=0.5, batch_size=batch_size) == 1
    assert max(predictor.batches) == min(batch_size, 10) and sum(predictor.batches) == 10
    coco = json.loads((tmp_path / "out" / "detections.json").read_text())
    expected = [index for index in range(11) if index != 5]
    assert [image["width"] for image in coco["images"]] == [20 + index for index in expected]
    assert [image["id"] for image in coco["images"]] == list(range(1, 11))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    counts = [sum(a["image_id"] == image for a in coco["annotations"]) for image in range(1, 11)]
    assert counts == [(20 + index) % 7 for index in expected]
    names = ["0.tif.png", "0.tif_2.png", "0.tif_3.png", "0.tif_4.png", "1.tif.png", "1.tif_2.png", "1.tif_3.png"]
    assert [image["drawing"] for image in coco["images"]] == [*names, "2.tif.png", "2.tif_2.png", "2.tif_3.png"]


def test_a_drawing_that_cannot_be_written_stops_the_run_and_keeps_the_others(tmp_path, capsys, monkeypatch):
    files = [str(tmp_path / f"{index}.png") for index in range(9)]
    for file in files:
        Image.new("RGB", (20, 30)).save(file)
    output, save = tmp_path / "out", Image.Image.save
    output.mkdir()

    def fail(image, path, *arguments, **options):
        if os.path.basename(path) == ".2.png.part":
            raise OSError(28, "No space left on device")
        save(image, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    assert demo.draw_images(FixedPredictor(), files, str(output), threshold=0.5) == 1
    printed = capsys.readouterr()
    assert printed.err.count("No space left on device") == 1 and "not processed" in printed.out
    coco = json.loads((output / "detections.json").read_text())
    drawn = [image["drawing"] for image in coco["images"]]
    assert drawn[:2] == ["0.png", "1.png"] and "2.png" not in drawn and len(drawn) < 8
    assert {path.name for path in output.iterdir()} == {*drawn, "detections.json"}


def test_an_image_that_the_model_cannot_take_is_reported_and_skipped(photos, tmp_path, capsys):
    class TooLarge(FixedPredictor):
        def predict(self, image):
            raise ImageError("image of 12 x 8 pixels is too large.")

    assert demo.draw_images(TooLarge(), [str(photos / "a" / "x.jpg")], str(tmp_path), threshold=0.5) == 1
    printed = capsys.readouterr()
    assert "x.jpg: image of 12 x 8 pixels is too large." in printed.err and "0 drawn, 1 failed" in printed.out


def test_one_image_that_an_exported_model_fails_on_does_not_stop_the_run(photos, tmp_path, capsys):
    class Fails(FixedPredictor):
        calls = 0

        def predict(self, image):
            self.calls += 1
            if self.calls == 2:
                raise PredictionError("model.onnx failed on an image of 12 x 8 pixels")
            return super().predict(image)

    files = [str(photos / "a" / name) for name in ("x.jpg", "scan.tif", "deep/x.png")]
    assert demo.draw_images(Fails(), files, str(tmp_path), threshold=0.5) == 1
    printed = capsys.readouterr()
    assert "2 drawn, 1 failed" in printed.out and "scan.tif: model.onnx failed" in printed.err


def test_a_link_in_the_output_folder_does_not_lead_to_an_overwritten_image(photos, tmp_path):
    source, output = photos / "a" / "x.jpg", tmp_path / "out"
    output.mkdir()
    before = source.read_bytes()
    (output / "x.jpg").symlink_to(source)
    assert demo.draw_images(FixedPredictor(), [str(source)], str(output), threshold=0.5) == 0
    assert source.read_bytes() == before and not (output / "x.jpg").is_symlink()
    assert {path.name for path in output.iterdir()} == {"x.jpg", "detections.json"}


def test_messages_are_printed_while_a_tiff_is_read(tmp_path, capfd):
    """Regression: reading a TIFF redirects file descriptor 2."""
    files = []
    for index in range(40):
        Image.new("RGB", (300, 300), "red").save(tmp_path / f"{index}.tif", compression="tiff_lzw")
        (tmp_path / f"{index}.jpg").write_bytes(b"broken")
        files += [str(tmp_path / f"{index}.tif"), str(tmp_path / f"{index}.jpg")]
    (tmp_path / "out").mkdir()
    assert demo.draw_images(FixedPredictor(), files, str(tmp_path / "out"), threshold=0.5) == 1
    printed = capfd.readouterr()
    assert all(f"{index}.jpg is not an image" in printed.err for index in range(40)) and "images/s" in printed.err


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_saves_what_is_drawn(tmp_path, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    files = [str(tmp_path / f"{index}.png") for index in range(6)]
    for file in files:
        Image.new("RGB", (20, 30)).save(file)
    (tmp_path / "out").mkdir()

    class Interrupts(FixedPredictor):
        calls = 0

        def predict(self, image):
            self.calls += 1
            if self.calls == 4:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            return super().predict(image)

    assert demo.draw_images(Interrupts(), files, str(tmp_path / "out"), threshold=0.5) == 130
    assert "3 drawn, 0 failed, 3 not processed, " in capsys.readouterr().out
    coco = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["drawing"] for image in coco["images"]] == ["0.png", "1.png", "2.png"]
