"""ExportedPredictor on hand-written models: results compared with Detectron2, errors, and without PyTorch."""

import json
import os
import subprocess
import sys

from halodet import ExportedPredictor
from halodet.inference import Detections, PredictorError
from halodet.inference.demo import draw_images
from halodet.inference.export_metadata import ExportedModelError

import exported_models as models
import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from helpers import ROOT, noise
from PIL import Image

pytest.importorskip("onnxruntime")

PANOPTIC = {"overlap_threshold": 0.5, "stuff_area_limit": 100, "instances_confidence_threshold": 0.5}
STUFF = ["things", "sky", "sea"]


def logits(height, width):
    return np.random.default_rng(1).normal(size=(3, height // 4, width // 4)).astype(np.float32)


def panoptic_arrays():
    masks = np.clip(models.MASKS + 0.3, 0, 1)
    arrays = {"boxes": models.BOXES, "scores": models.SCORES, "classes": models.CLASSES}
    return {**arrays, "masks": masks, "sem_seg": logits(64, 96)}


def write(folder, kind="onnx", description=None, count=None, **arrays):
    """Write a model in one of the formats."""
    description = description or models.metadata()
    file = models.write_onnx(folder / "model.onnx", description, count, **arrays)
    if kind == "onnx":
        return file
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(str(file))
    model.set_rt_info(description.to_json(), ["halodet"])
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_objects_are_those_of_detectron2(tmp_path, kind):
    image = noise(100, 150)
    predictor = ExportedPredictor(write(tmp_path, kind), num_threads=1)
    assert predictor.classes == [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    assert predictor.stuff_classes == [] and predictor.metadata.detector == "GeneralizedRCNN"
    resized = np.asarray(Image.fromarray(image).resize((72, 48), Image.Resampling.BILINEAR))
    found = Instances((48, 72), pred_boxes=Boxes(torch.from_numpy(models.BOXES.copy())))
    found.scores = torch.from_numpy(models.SCORES + np.float32(resized[:, :, 0].astype(np.float32).mean() * 1e-6))
    found.pred_classes, found.pred_masks = torch.from_numpy(models.CLASSES), torch.from_numpy(models.MASKS)[:, None]
    expected = Detections.from_instances(detector_postprocess(found, 100, 150))
    result = predictor(image)
    assert len(result) == 3 and result.image_size == (100, 150)
    assert np.array_equal(result.boxes, expected.boxes) and np.array_equal(result.labels, expected.classes)
    assert result.masks.dtype == bool and np.array_equal(result.masks, expected.masks)
    assert np.allclose(result.scores, expected.scores, atol=1e-7, rtol=0)
    assert result.scores.dtype == np.float32 and result.labels.dtype == np.int64


def test_the_channels_are_in_the_order_of_the_model(tmp_path):
    image = np.zeros((50, 60, 3), np.uint8)
    image[:, :, 2] = 200  # red
    for order, mean in (("BGR", 0), ("RGB", 200)):
        predictor = ExportedPredictor(write(tmp_path, description=models.metadata(input_format=order)))
        assert predictor.input_format == order
        assert predictor(image).scores[0] == pytest.approx(0.9 + mean * 1e-6, abs=2e-7)


def test_images_of_all_kinds_are_the_same_image(tmp_path):
    predictor, image = ExportedPredictor(write(tmp_path)), noise(40, 30)
    Image.fromarray(image[:, :, ::-1]).save(tmp_path / "a.png")
    rgb = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
    expected = predictor(image)
    for other in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image[:, :, ::-1]), rgb):
        assert np.array_equal(predictor(other).scores, expected.scores)
    with pytest.raises(PredictorError, match="float32"):
        predictor(image.astype(np.float32))


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3)])
def test_tiny_and_narrow_images_are_predicted(tmp_path, size):
    found = ExportedPredictor(write(tmp_path))(noise(*size))
    assert found.image_size == size and found.masks.shape[1:] == size


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_nothing_found_is_an_empty_result(tmp_path, kind):
    found = ExportedPredictor(write(tmp_path, kind, count=0))(noise(20, 30))
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.masks.shape == (0, 20, 30)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_panoptic_segments_are_those_of_detectron2(tmp_path, kind):
    arrays = panoptic_arrays()
    outputs = list(arrays)
    description = models.metadata(outputs=outputs, stuff_classes=STUFF, panoptic=PANOPTIC)
    predictor = ExportedPredictor(write(tmp_path, kind, description, **arrays))
    result = predictor.predict(noise(100, 150))  # resized to 48 x 72, padded to 64 x 96
    scores = torch.nn.functional.interpolate(
        torch.from_numpy(arrays["sem_seg"])[None], scale_factor=4, mode="bilinear", align_corners=False
    )[0]
    labels = sem_seg_postprocess(scores, (48, 72), 100, 150).argmax(0)
    found = result["instances"]
    instances = Instances((100, 150), scores=torch.from_numpy(found.scores))
    instances.pred_classes, instances.pred_masks = torch.from_numpy(found.classes), torch.from_numpy(found.masks)
    expected, infos = combine_semantic_and_instance_outputs(instances, labels, 0.5, 100, 0.5)
    segments, found_infos = result["panoptic_seg"]
    assert segments.dtype == np.int32 and (segments != expected.numpy()).sum() <= 2
    assert [(i["id"], i["isthing"], i["category_id"]) for i in found_infos] == [
        (i["id"], i["isthing"], i["category_id"]) for i in infos
    ]
    assert {info["isthing"] for info in found_infos} == {True, False}
    assert (result["sem_seg"] != labels.numpy()).sum() <= 2


def test_the_score_threshold_is_that_of_panoptic_segments(tmp_path):
    outputs = ["boxes", "scores", "classes", "masks", "sem_seg"]
    description = models.metadata(outputs=outputs, stuff_classes=STUFF, panoptic=PANOPTIC)
    file = write(tmp_path, description=description, **panoptic_arrays())
    for given, expected in ((None, PANOPTIC["instances_confidence_threshold"]), (0, 0), (0.95, 0.95)):
        exported = ExportedPredictor(file, score_threshold=given)
        assert exported.panoptic["instances_confidence_threshold"] == expected
        infos = exported(np.zeros((60, 90, 3), np.uint8)).panoptic_seg[1]
        things = [info["score"] for info in infos if info["isthing"]]
        assert all(score >= expected for score in things) and bool(things) == (given != 0.95)


def test_semantic_segmentation_alone(tmp_path):
    arrays = {"sem_seg": logits(64, 96)}
    description = models.metadata(outputs=["sem_seg"], stuff_classes=STUFF, classes=[])
    predictor = ExportedPredictor(write(tmp_path, description=description, **arrays))
    result = predictor.predict(noise(48, 72))
    assert set(result) == {"sem_seg"} and result["sem_seg"].shape == (48, 72) and predictor.stuff_classes == STUFF
    assert len(predictor(noise(48, 72))) == 0


def test_boxes_without_masks(tmp_path):
    arrays = {name: array for name, array in panoptic_arrays().items() if name in ("boxes", "scores", "classes")}
    found = ExportedPredictor(write(tmp_path, description=models.metadata(outputs=list(arrays)), **arrays))(
        noise(48, 72)
    )
    assert found.masks is None and len(found) == 3


def test_torchscript_is_run_with_pytorch(tmp_path):
    class Constant(torch.nn.Module):
        def forward(self, image):
            shift = image[0].mean() * 1e-6
            boxes, masks = torch.from_numpy(models.BOXES), torch.from_numpy(models.MASKS)
            return boxes + 0 * shift, torch.from_numpy(models.SCORES) + shift, torch.from_numpy(models.CLASSES), masks

    traced = torch.jit.trace(Constant(), torch.zeros(3, 48, 72))
    torch.jit.save(traced, tmp_path / "model.torchscript", {"halodet.json": models.metadata().to_json()})
    image = noise(100, 150)
    found, expected = (ExportedPredictor(f)(image) for f in (tmp_path / "model.torchscript", write(tmp_path)))
    assert np.array_equal(found.boxes, expected.boxes) and np.array_equal(found.masks, expected.masks)
    assert np.allclose(found.scores, expected.scores, atol=1e-7, rtol=0)
    torch.jit.save(traced, tmp_path / "plain.torchscript")
    with pytest.raises(ExportedModelError, match="plain.torchscript has no halodet metadata"):
        ExportedPredictor(tmp_path / "plain.torchscript")


def newer(folder):
    model = onnx.load(str(write(folder)))
    text = json.loads(model.metadata_props[0].value) | {"format_version": 2, "halodet": "7.0"}
    onnx.helper.set_model_props(model, {"halodet": json.dumps(text)})
    onnx.save(model, str(folder / "newer.onnx"))
    return folder / "newer.onnx"


def unknown_operator(folder):
    model = onnx.load(str(write(folder)))
    model.graph.node[0].op_type = "HaloAttention"
    onnx.save(model, str(folder / "operator.onnx"))
    return folder / "operator.onnx"


def truncated(folder):
    data = write(folder).read_bytes()
    (folder / "truncated.onnx").write_bytes(data[: len(data) // 2])
    return folder / "truncated.onnx"


def renamed_input(folder):
    model = onnx.load(str(write(folder)))
    model.graph.input[0].name = model.graph.node[0].input[0] = "picture"
    onnx.save(model, str(folder / "input.onnx"))
    return folder / "input.onnx"


def other_program(folder):
    return models.write_onnx(folder / "other.onnx", None)


def without_output(folder):
    arrays = {"boxes": models.BOXES, "scores": models.SCORES, "classes": models.CLASSES}
    return models.write_onnx(folder / "outputs.onnx", models.metadata(), **arrays)


def without_weights(folder):
    file = write(folder, "openvino")
    file.with_suffix(".bin").unlink()
    return file


def broken_openvino(folder):
    file = write(folder, "openvino")
    file.write_text(file.read_text()[:300])
    return file


def other_openvino(folder):
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(str(write(folder))), folder / "other.xml")
    return folder / "other.xml"


def text_file(folder):
    (folder / "a.txt").touch()
    return folder / "a.txt"


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (lambda folder: folder / "none.onnx", ["none.onnx", "does not exist"]),
        (lambda folder: folder / "none.xml", ["none.xml", "does not exist"]),
        (lambda folder: folder, ["expected a file .onnx, .xml, .torchscript"]),
        (lambda folder: folder / "a.pt2", ["a.pt2", "torch.export.load"]),
        (text_file, ["a.txt", ".onnx"]),
        (newer, ["newer.onnx", "format_version=2", "7.0"]),
        (unknown_operator, ["operator.onnx", "HaloAttention", "onnxruntime"]),
        (truncated, ["truncated.onnx", "onnxruntime"]),
        (renamed_input, ["input.onnx", "picture", '"image"']),
        (other_program, ["other.onnx", "no halodet metadata"]),
        (without_output, ["outputs.onnx", "no output masks"]),
        (without_weights, ["model.bin", "does not exist"]),
        (broken_openvino, ["model.xml", "openvino"]),
        (other_openvino, ["other.xml", "no halodet metadata"]),
    ],
)
def test_files_that_cannot_be_used_are_one_message(tmp_path, capfd, make, reasons):
    with pytest.raises(ExportedModelError) as caught:
        ExportedPredictor(make(tmp_path))
    message = str(caught.value)
    assert all(reason in message for reason in reasons), message
    assert "\n" not in message and len(message) < 600 and caught.value.exit_code == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("module", "kind"), [("onnxruntime", "onnx"), ("openvino", "openvino"), ("torch", "onnx")])
def test_a_runtime_that_is_not_installed_is_named(tmp_path, monkeypatch, module, kind):
    file = write(tmp_path, kind)
    if module == "torch":
        file = file.rename(tmp_path / "model.torchscript")
    monkeypatch.setitem(sys.modules, module, None)
    extra = "train" if module == "torch" else "runtime"
    with pytest.raises(ExportedModelError, match=rf"pip install 'halodet\[{extra}\]'") as caught:
        ExportedPredictor(file)
    assert isinstance(caught.value.__cause__, ImportError) and file.name in str(caught.value)


def test_a_failure_of_the_runtime_names_file_and_image(tmp_path, monkeypatch):
    predictor = ExportedPredictor(write(tmp_path))

    def fail(image):
        raise RuntimeError("[ONNXRuntimeError]\n bad shape")

    monkeypatch.setattr(predictor, "_run", fail)
    with pytest.raises(ExportedModelError, match=r"model.onnx .*72 x 48.*bad shape"):
        predictor(noise(100, 150))


def test_a_class_that_the_metadata_lacks_is_named(tmp_path):
    predictor = ExportedPredictor(write(tmp_path, description=models.metadata(classes=[{"id": 1, "name": "a"}])))
    with pytest.raises(ExportedModelError, match="class 1"):
        predictor(noise(100, 150))


def test_the_demo_without_pytorch(tmp_path):
    """An exported model runs; a config names what it needs, in one line."""
    file = write(tmp_path)
    Image.fromarray(noise(100, 150)).save(tmp_path / "a.png")
    code = "import runpy; sys.argv = ['demo.py', *sys.argv[1:]]; runpy.run_path('tools/demo.py', run_name='__main__')"
    given = ["--input", tmp_path / "a.png", "--output", tmp_path / "out"]
    done = run_without_torch(code, "--model", file, *given)
    assert done.returncode == 0, done.stderr
    done = run_without_torch(code, "--config-file", "configs/mask_rcnn_halo_h4.yaml", *given)
    assert done.returncode == 2 and "halodet[train]" in done.stderr and len(done.stderr.splitlines()) == 1
    code = code.replace("demo", "export")
    done = run_without_torch(code, "--config-file", "c", "--format", "onnx", "--output", tmp_path / "m.onnx")
    assert done.returncode == 2 and "halodet[train]" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_demo_of_an_exported_model_does_not_import_pytorch(tmp_path):
    file = write(tmp_path)
    Image.fromarray(noise(100, 150)).save(tmp_path / "a.png")
    code = """import runpy, sys
sys.argv = ["demo.py", *sys.argv[1:]]
try:
    runpy.run_path("tools/demo.py", run_name="__main__")
except SystemExit as done:
    assert done.code == 0
assert not {"torch", "detectron2"} & set(sys.modules)
"""
    given = [f"--model={file}", "--input", tmp_path / "a.png", "--output", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", code, *map(str, given)], check=True, cwd=ROOT, timeout=120)


def test_minimum_score(tmp_path):
    file, image = write(tmp_path), noise(100, 150)
    everything = ExportedPredictor(file)(image)
    score = float(np.sort(everything.scores)[1])
    found = ExportedPredictor(file, score_threshold=score)(image)
    assert 0 < len(found) < len(everything)
    np.testing.assert_array_equal(found.scores, everything.scores[everything.scores >= score])
    np.testing.assert_array_equal(found.masks, everything.masks[everything.scores >= score])
    with pytest.raises(ExportedModelError, match=r"score_threshold=1\.5"):
        ExportedPredictor(file, score_threshold=1.5)


def test_invalid_number_of_threads(tmp_path):
    with pytest.raises(ExportedModelError, match="num_threads=0"):
        ExportedPredictor(write(tmp_path), num_threads=0)


BLOCKED = ("torch", "torchvision", "detectron2", "fvcore", "pycocotools", "matplotlib", "iopath", "omegaconf", "yaml")
WITHOUT_TORCH = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
PREDICT = """
import json
import numpy as np
import onnx
from halodet import ExportedPredictor
from halodet.inference import draw, read_image
from halodet.inference.demo import draw_images
predictor = ExportedPredictor(sys.argv[1])
found = predictor(sys.argv[2])
np.savez(sys.argv[3] + "/found.npz", boxes=found.boxes, scores=found.scores, masks=found.masks)
assert draw_images(predictor, [sys.argv[2]], sys.argv[3], threshold=0.5) == 0
assert not {name.split(".")[0] for name in sys.modules} & {"torch", "detectron2", "matplotlib", "pycocotools"}
import halodet
for get in (lambda: halodet.Predictor, lambda: halodet.inference.Predictor, lambda: halodet.HaloNet):
    try:
        get()
    except ImportError as error:
        assert sys.version_info < (3, 11) or "pip install 'halodet[train]'" in error.__notes__[0]
        assert sys.version_info < (3, 11) or len(error.__notes__) == 1
    else:
        raise AssertionError("expected an error")
"""


def run_without_torch(code, *arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH + code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_everything_runs_without_pytorch_and_detectron2(tmp_path, kind):
    file = write(tmp_path, kind)
    Image.fromarray(noise(100, 150)).save(tmp_path / "a.png")
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    done = run_without_torch(PREDICT, file, tmp_path / "a.png", tmp_path / "without")
    assert done.returncode == 0, done.stderr
    predictor = ExportedPredictor(file)
    found, expected = np.load(tmp_path / "without" / "found.npz"), predictor(tmp_path / "a.png")
    assert all(np.array_equal(found[name], getattr(expected, name)) for name in ("boxes", "scores", "masks"))
    assert draw_images(predictor, [str(tmp_path / "a.png")], str(tmp_path / "with"), threshold=0.5) == 0
    assert (tmp_path / "with/a.png").read_bytes() == (tmp_path / "without/a.png").read_bytes()
    results = [json.loads((tmp_path / name / "detections.json").read_text()) for name in ("with", "without")]
    assert results[0] == results[1] and len(results[0]["annotations"]) == 2
