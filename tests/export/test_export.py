"""Exported detectors against their models, at sizes that differ from the traced one."""

import os
from pathlib import Path

from halodet.data.synthetic_shapes import shape_scene
from halodet.export import ExportableBackbone, ExportableDetector, ExportError, export_model, formats, main
from halodet.export.check import SIZES, TOLERANCES, compare_detectors
from halodet.export.main import describe, export_detector, hash_weights, map_difference, max_detections, score_threshold
from halodet.inference import ExportedModelError, ExportedPredictor

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

pytestmark = pytest.mark.slow
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript", "pt2": ".pt2"}
RUNTIME = {"onnx": "onnxruntime", "openvino": "openvino", "torchscript": "torch"}
CASES = [
    ("onnx", "cascade"), ("onnx", "retinanet"), ("onnx", "panoptic"), ("openvino", "mask"), ("torchscript", "faster"),
]  # fmt: skip


def scene(index):
    return np.clip(np.rint(shape_scene("val", index).image), 0, 255).astype(np.uint8)[:, :, ::-1].copy()


def write(predictor, path, form, **options):
    model = ExportableDetector(predictor.model)
    metadata = describe(predictor, model, "float32")
    return export_model(model, path, form, metadata, predictor.model_input(scene(0))["image"], **options)


@pytest.fixture(scope="module")
def mask_file(detector, tmp_path_factory):
    """An exported Mask R-CNN."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("exported") / "mask.onnx"
    write(detector("mask")[1], path, "onnx")
    return path


def compare(predictor, exported, images, margin):
    options = {"threshold": score_threshold(predictor.model), "limit": max_detections(predictor.model)}
    return list(compare_detectors(predictor, exported, images, **options, margin=margin))


def check(predictor, path):
    comparisons = compare(predictor, ExportedPredictor(path), [scene(i) for i in range(3)], 2e-3)
    assert len(comparisons) == len(SIZES)
    assert all(c.usable and c.expected > 3 for c in comparisons)  # else nothing is tested
    assert all(c.agrees(TOLERANCES["float32"]) for c in comparisons), comparisons
    return comparisons[0]


def test_onnx_file_agrees_with_mask_rcnn_at_five_sizes(detector, mask_file):
    assert check(detector("mask")[1], mask_file).mask is not None


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_file_agrees_with_the_model_at_five_sizes(detector, tmp_path, kind, form):
    pytest.importorskip(RUNTIME[form])
    predictor, path = detector(kind)[1], tmp_path / f"model{SUFFIX[form]}"
    files = write(predictor, path, form)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    compared = check(predictor, path)
    assert (compared.mask is None) == (kind in ("faster", "retinanet"))
    assert (compared.pixels is None) == (kind != "panoptic")


def test_an_image_without_detections(detector, mask_file):
    predictor, exported = detector("mask")[1], ExportedPredictor(mask_file)
    black = np.zeros((40, 90, 3), np.uint8)
    expected, found = predictor(black), exported(black)
    assert len(found) == len(expected)
    assert found.masks.shape == (len(expected), 40, 90)


def test_metadata(detector, mask_file):
    cfg, predictor = detector("mask")
    metadata = ExportedPredictor(mask_file).metadata
    assert (metadata.min_size, metadata.max_size, metadata.input_format) == (96, 160, cfg.INPUT.FORMAT)
    assert metadata.classes == predictor.classes
    assert metadata.score_threshold == cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
    assert metadata.outputs == ["boxes", "scores", "classes", "masks"]
    assert metadata.weights_sha256 == hash_weights(predictor.model)
    predictor.model.pixel_mean += 1
    assert metadata.weights_sha256 != hash_weights(predictor.model)
    predictor.model.pixel_mean -= 1


def test_a_changed_file_is_noticed(detector, mask_file, tmp_path):
    """The comparison fails for a file of other weights."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(str(mask_file))
    for tensor in proto.graph.initializer:
        if "mask_head.predictor.weight" in tensor.name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, str(tmp_path / "changed.onnx"))
    predictor, exported = detector("mask")[1], ExportedPredictor(tmp_path / "changed.onnx")
    comparisons = compare(predictor, exported, [scene(0)], 2e-3)
    assert not any(c.agrees(TOLERANCES["float32"]) for c in comparisons)
    assert all(c.score < 1e-3 and c.mask > 0.5 for c in comparisons), comparisons


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_backbone_of_any_size_and_batch(detector, tmp_path, form):
    predictor, lines = detector("mask")[1], []
    assert export_detector(predictor, tmp_path / f"backbone{SUFFIX[form]}", form, backbone_only=True, show=lines.append)
    assert len(ExportableBackbone(predictor.model.backbone).outputs) == 5
    assert any("2x640x480" in line for line in lines)
    if form == "onnx":
        with pytest.raises(ExportedModelError, match="backbone only"):
            ExportedPredictor(tmp_path / "backbone.onnx")


def test_int8_keeps_most_detections(detector, tmp_path):
    pytest.importorskip("onnxruntime")
    predictor, lines, images = detector("mask")[1], [], []
    for index in range(8):
        images.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(scene(index)[:, :, ::-1]).save(images[-1])
    path = tmp_path / "int8.onnx"
    export_detector(predictor, path, "onnx", int8=True, calibration=images, show=lines.append)
    float_size = sum(p.numel() for p in predictor.model.parameters()) * 4
    assert path.stat().st_size < 0.6 * float_size
    comparisons = compare(predictor, ExportedPredictor(path), [scene(20)], 0.05)
    assert sum(c.matched for c in comparisons) > 0.5 * sum(c.expected for c in comparisons)
    assert 0 < max(c.score for c in comparisons) < 0.5


def test_half_stores_half_as_much(detector, mask_file, tmp_path):
    predictor, path = detector("mask")[1], tmp_path / "half.onnx"
    write(predictor, path, "onnx", half=True)
    assert path.stat().st_size < 0.7 * mask_file.stat().st_size
    comparisons = compare(predictor, ExportedPredictor(path), [scene(0)], 0.04)
    assert all(c.agrees(TOLERANCES["float16"]) for c in comparisons), comparisons


@pytest.mark.parametrize(
    ("form", "name", "options", "expected"),
    [
        ("tflite", "m.onnx", {}, "tflite"),
        ("onnx", "m.pt", {}, r"m\.pt.*\.onnx"),
        ("pt2", "m.pt2", {}, "--backbone-only"),
        ("torchscript", "m.torchscript", {"half": True}, "half"),
        ("onnx", "m.onnx", {"half": True, "calibration": [np.zeros((3, 96, 96), np.float32)]}, "--half and --int8"),
    ],
)
def test_what_a_format_cannot_hold(detector, tmp_path, form, name, options, expected):
    with pytest.raises(ExportError, match=expected):
        write(detector("mask")[1], tmp_path / name, form, **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_previous_file(detector, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"previous")

    def fail(*arguments, **options):
        open(arguments[2], "wb").close()
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match="first line$"):
        write(detector("mask")[1], path, "onnx")
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path]


def test_models_that_cannot_be_exported(detector):
    with pytest.raises(ExportError, match="Linear"):
        ExportableDetector(torch.nn.Linear(1, 1))
    model = detector("mask")[1].model
    model.roi_heads.keypoint_on = True
    try:
        with pytest.raises(ExportError, match="KEYPOINT_ON"):
            ExportableDetector(model)
    finally:
        model.roi_heads.keypoint_on = False


def test_tool(detector, tool, tmp_path, capsys):
    """Exit codes: 0 with a table, 1 where nothing is detected, 2 for invalid arguments."""
    pytest.importorskip("onnxruntime")
    cfg, _ = detector("mask")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    given = ["--config-file", str(tmp_path / "config.yaml"), "--format", "onnx", "--output", str(tmp_path / "m.onnx")]
    assert tool(given, "export") == 0
    assert "480x640" in capsys.readouterr().out
    assert ExportedPredictor(tmp_path / "m.onnx").metadata.score_threshold == cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
    (tmp_path / "model_final.pth").symlink_to(cfg.MODEL.WEIGHTS)
    given[1] = str(tmp_path)  # as OUTPUT_DIR of a run
    quiet = ["--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"]
    assert tool([*given, *quiet], "export") == 1
    assert "--images" in capsys.readouterr().out
    assert tool([*given, "--int8"], "export") == 2
    assert "--calibration" in capsys.readouterr().err
    assert tool([*given, "--calibration", str(ROOT / "docs" / "demo.jpg")], "export") == 2
    assert "--int8" in capsys.readouterr().err
    assert tool([*given, "--opts", "MODEL.WEIGHTS", ""], "export") == 2
    assert "MODEL.WEIGHTS" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert tool([*given, "--images", str(tmp_path / "bad.png")], "export") == 2
    assert "bad.png" in capsys.readouterr().err
    given[-1] = str(tmp_path / "absent" / "m.onnx")
    assert tool(given, "export") == 2
    assert "absent" in capsys.readouterr().err
    assert tool([*given, "--images", str(tmp_path / "absent")], "export") == 2
    assert "--output" in capsys.readouterr().err  # named before anything is loaded


def test_feature_maps_that_are_wrong_disagree():
    expected = np.arange(12.0).reshape(1, 3, 2, 2)
    assert map_difference(expected, expected) == 0 and map_difference(expected, 1.1 * expected) == pytest.approx(0.1)
    assert map_difference(expected, 0 * expected) == 1
    assert np.isnan(map_difference(expected, expected * np.nan))
    assert map_difference(expected, expected[0]) == np.inf


@pytest.mark.parametrize("factor", [0.0, 0.5, float("nan")])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_backbone_file_of_other_values_disagrees(detector, tmp_path, monkeypatch, precision, factor):
    predictor, lines = detector("mask")[1], []
    model = ExportableBackbone(predictor.model.backbone)

    def run(images):
        with torch.no_grad():
            return {n: factor * x.numpy() for n, x in zip(model.outputs, model(torch.from_numpy(images)), strict=True)}

    monkeypatch.setattr(main, "_open_backbone", lambda *_: run)
    assert not main._check_backbone(predictor, model, tmp_path, "onnx", [scene(0)], precision, lines.append)
    assert "disagrees" in lines[-1]


def test_a_file_that_the_runtime_cannot_load_leaves_the_previous_one(detector, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"previous")

    def fail(file):
        assert file.stat().st_size > 1e5 and file.parent != tmp_path
        raise ExportedModelError("unknown operator")

    monkeypatch.setattr(main, "ExportedPredictor", fail)
    with pytest.raises(ExportedModelError, match="unknown operator"):
        export_detector(detector("mask")[1], path, "onnx", show=lambda line: None)
    assert path.read_bytes() == b"previous" and list(tmp_path.iterdir()) == [path]


def test_two_files_are_replaced_together(tmp_path):
    new, folder = tmp_path / "new", tmp_path / "folder"
    for path, text in ((new, "new"), (folder, "old")):
        path.mkdir()
        for suffix in ("bin", "xml"):
            (path / f"a.{suffix}").write_text(text)
    real = os.replace

    def replace(source, target):
        if Path(target) == folder / "a.xml" and Path(source).read_text() == "new":
            raise OSError(5, "Input/output error")
        real(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", replace)
        formats._move([new / "a.bin", new / "a.xml"], folder)
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a.bin": "old", "a.xml": "old"}
