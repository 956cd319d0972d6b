"""Predictor, to_coco and the class list, on a small Mask R-CNN whose weights are made here."""

import json
import shutil

from halodet.data.classes import ClassesError, read_classes, write_classes
from halodet.errors import CheckpointError, ConfigError
from halodet.inference import Detections, ExportedPredictor, Predictor, PredictorError, draw, to_coco
from halodet.inference.as_bgr import as_bgr

import cv2
import exported_models
import numpy as np
import onnx
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import CreatesFile, noise
from PIL import Image


def small_config():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7
    cfg.INPUT.MIN_SIZE_TEST = 96
    cfg.INPUT.MAX_SIZE_TEST = 160
    return cfg


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config whose weights find something."""
    cfg = small_config()
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    folder = tmp_path_factory.mktemp("run")
    DetectionCheckpointer(model, str(folder)).save("model_final")
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    return cfg


def test_predictions_are_detectron2s_in_pixels_of_the_image(trained):
    image = noise(60, 90)
    found = Predictor(trained).predict(image)["instances"]
    assert len(found) > 0 and (found.pred_boxes.area() > 1).any()
    assert found.image_size == (60, 90) and found.pred_masks.shape[1:] == (60, 90) and found.scores.device.type == "cpu"
    expected = DefaultPredictor(trained)(image)["instances"]
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor) and torch.equal(
        found.scores, expected.scores
    )


def test_a_batch_gives_the_results_of_single_images(trained):
    predictor = Predictor(trained)
    calls, model = [], predictor.model
    predictor.model = lambda inputs: calls.append(len(inputs)) or model(inputs)
    images = [noise(60, 90, 0), noise(90, 60, 1), noise(60, 90, 2), noise(120, 180, 3)]
    batch = predictor.predict_batch(images)
    assert calls == [3, 1], "images of the same size after resizing share a call"
    for image, result in zip(images, batch, strict=True):
        found, expected = result["instances"], predictor.predict(image)["instances"]
        assert found.image_size == image.shape[:2] and len(found) == len(expected) > 0
        assert torch.equal(found.pred_classes, expected.pred_classes)
        assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
        assert torch.allclose(found.scores, expected.scores, atol=1e-3)
        assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3
    assert predictor.predict_batch([]) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 8000), (8000, 3)])
def test_tiny_and_narrow_images_are_predicted(trained, size):
    assert Predictor(trained)(noise(*size)).image_size == size


def test_a_large_enough_image_is_resized_as_detectron2_does(trained):
    predictor = Predictor(trained)
    for size in ((60, 90), (500, 100)):
        expected = DefaultPredictor(trained).aug.get_transform(noise(*size)).apply_image(noise(*size))
        assert np.array_equal(predictor.aug.get_transform(noise(*size)).apply_image(noise(*size)), expected)


def test_images_of_all_kinds_are_the_same_image(tmp_path):
    bgr = noise(20, 30)
    cv2.imwrite(str(tmp_path / "a.png"), bgr)
    rgb = np.ascontiguousarray(bgr[:, :, ::-1])
    opaque = np.dstack([bgr, np.full((20, 30), 255, np.uint8)])
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    for image in (bgr, tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(rgb), opaque, tensor):
        assert np.array_equal(as_bgr(image), bgr), type(image)
    grey = bgr[:, :, 0]
    for image in (grey, grey[:, :, None], torch.from_numpy(grey.copy())[None], Image.fromarray(grey)):
        assert np.array_equal(as_bgr(image), np.dstack([grey] * 3)), type(image)
    transparent = np.dstack([bgr, np.zeros((20, 30), np.uint8)])
    assert (as_bgr(transparent) == 255).all()


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((4, 5, 3), np.float32), r"\(4, 5, 3\) and type float32"),
        (np.zeros((4, 5, 2), np.uint8), r"\(4, 5, 2\)"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"\(1, 4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"\(4, 5, 3\)"),
        (torch.zeros(3, 4, 5), "float32"),
        (None, "NoneType"),
    ],
)
def test_other_images_are_named(image, named):
    with pytest.raises(PredictorError, match=named):
        as_bgr(image)


def test_the_predictor_takes_a_file_and_a_pillow_image(trained, tmp_path):
    predictor, image = Predictor(trained), noise(80, 96)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    expected = predictor.predict(image)["instances"]
    for other in (tmp_path / "a.png", Image.fromarray(image[:, :, ::-1])):
        found = predictor.predict(other)["instances"]
        assert len(found) > 0 and torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_weights_that_are_not_there_are_refused(trained, tmp_path):
    cfg = trained.clone()
    (tmp_path / "text.pth").write_text("no checkpoint")
    for weights, reason in {
        "": "MODEL.WEIGHTS",
        str(tmp_path / "none.pth"): "none.pth",
        str(tmp_path / "text.pth"): "text.pth",
    }.items():
        cfg.MODEL.WEIGHTS = weights
        with pytest.raises(CheckpointError, match=reason) as caught:
            Predictor(cfg)
        assert "\n" not in str(caught.value)


def test_weights_that_leave_parameters_at_random_are_refused(trained, tmp_path):
    cfg = trained.clone()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5  # 3 predictors, each with weight and bias, change their shape
    with pytest.raises(CheckpointError, match=r": 6 of \d+ tensors"):
        Predictor(cfg)
    model = build_model(trained)
    torch.save(
        {"model": {"backbone." + key: value for key, value in model.backbone.state_dict().items()}},
        tmp_path / "backbone.pth",
    )
    cfg = trained.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match="proposal_generator"):
        Predictor(cfg)


def test_weights_that_bring_code_are_refused_and_do_not_run_it(trained, tmp_path):
    cfg = trained.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "code.pth")
    torch.save({"model": {}, "payload": CreatesFile(str(tmp_path / "made"))}, cfg.MODEL.WEIGHTS)
    with pytest.raises(CheckpointError, match="io.open"):
        Predictor(cfg)
    assert not (tmp_path / "made").exists()


def test_to_coco_maps_classes_and_keeps_boxes_and_masks():
    found = Instances((20, 30), pred_boxes=Boxes(torch.tensor([[2.0, 3.0, 12.0, 8.0], [0.0, 0.0, 30.0, 20.0]])))
    found.scores, found.pred_classes = torch.tensor([0.75, 0.5]), torch.tensor([1, 0])
    found.pred_masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    found.pred_masks[0, 3:8, 2:12] = True
    first, second = json.loads(json.dumps(to_coco(found, 7, [10, 20])))
    assert (first["image_id"], first["category_id"], second["category_id"]) == (7, 20, 10)
    assert first["bbox"] == [2, 3, 10, 5] and first["score"] == 0.75
    assert isinstance(first["segmentation"]["counts"], str) and first["segmentation"]["size"] == [20, 30]
    assert np.array_equal(mask_util.decode(first["segmentation"]), found.pred_masks[0].numpy())
    found.remove("pred_masks")
    assert "segmentation" not in to_coco(found, 7, [10, 20])[0]
    assert to_coco(found[:0], 7, [10, 20]) == []


def test_classes_come_from_the_run_then_the_metadata_then_numbers(tmp_path):
    cfg = small_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.DATASETS.TEST = ("halodet_classes_test",)
    assert read_classes(cfg) == [{"id": 0, "name": "class 0"}, {"id": 1, "name": "class 1"}]
    assert "halodet_classes_test" not in MetadataCatalog.list()
    metadata = MetadataCatalog.get("halodet_classes_test")
    metadata.set(thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id={90: 1, 17: 0})
    try:
        assert read_classes(cfg) == [{"id": 17, "name": "cat"}, {"id": 90, "name": "dog"}]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        assert read_classes(cfg)[2] == {"id": 2, "name": "class 2"}
    finally:
        MetadataCatalog.remove("halodet_classes_test")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    classes = [{"id": 5, "name": "Nüsse"}, {"id": 3, "name": "猫"}]
    write_classes(tmp_path / "classes.json", classes)
    assert read_classes(cfg) == classes
    assert [path.name for path in tmp_path.iterdir()] == ["classes.json"]


def test_builtin_coco_names_need_no_files():
    cfg = small_config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    cfg.DATASETS.TEST = ("coco_2017_val",)
    assert read_classes(cfg)[79] == {"id": 90, "name": "toothbrush"}


def test_retinanet_has_its_own_number_of_classes(tmp_path):
    cfg = small_config()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert len(read_classes(cfg)) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"id": 1, "name": "a"}]', "classes.json"),
        ('[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "classes.json"),
        ('[{"id": "1", "name": "a"}, {"id": 2, "name": "b"}]', "classes.json"),
        ('{"id": 1}', "classes.json"),
        ('[{"id": 1,', "classes.json"),
    ],
)
def test_a_class_list_that_does_not_fit_is_refused(tmp_path, content, reason):
    (tmp_path / "classes.json").write_text(content)
    cfg = small_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    with pytest.raises(ClassesError, match=reason):
        read_classes(cfg)


def test_classes_that_cannot_be_written_leave_the_old_file(tmp_path):
    path = tmp_path / "classes.json"
    write_classes(path, [{"id": 1, "name": "a"}])
    with pytest.raises(TypeError):
        write_classes(path, [{"id": None, "name": "b"}])
    with pytest.raises(OSError):
        write_classes(tmp_path / "none" / "classes.json", [])
    assert json.loads(path.read_text()) == [{"id": 1, "name": "a"}]


class Traced(torch.nn.Module):
    """A detector as an exported model: (3, H, W) image -> boxes, scores, classes, masks in pixels of that image."""

    def __init__(self, model):
        super().__init__()

        def infer(model, inputs):
            found = model.inference(inputs, do_postprocess=False)[0]
            return found.pred_boxes.tensor, found.scores, found.pred_classes, found.pred_masks[:, 0]

        self.adapter = TracingAdapter(model, [{"image": torch.zeros(3, 96, 144)}], infer)

    def forward(self, image):
        with torch.no_grad():
            return self.adapter(image)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_an_exported_model_gives_the_results_of_the_predictor(trained, tmp_path, kind):
    predictor, file = Predictor(trained), tmp_path / f"model.{kind}"
    torch.nn.init.normal_(predictor.model.roi_heads.mask_head.predictor.weight, std=1.0)
    metadata = exported_models.metadata(min_size=96, max_size=160, score_threshold=0.05, classes=predictor.classes)
    model, image = Traced(predictor.model).eval(), torch.from_numpy(noise(96, 144)).permute(2, 0, 1).float()
    if kind == "torchscript":
        traced = torch.jit.trace(model, image, check_trace=False)
        torch.jit.save(traced, file, {"halodet.json": metadata.to_json()})
    else:
        pytest.importorskip("onnxruntime")
        names = {"input_names": ["image"], "output_names": ["boxes", "scores", "classes", "masks"]}
        axes = {"dynamic_axes": {"image": {1: "height", 2: "width"}}, "opset_version": 17, "dynamo": False}
        torch.onnx.export(model, (image,), file, **names, **axes)
        exported = onnx.load(file)
        onnx.helper.set_model_props(exported, {"halodet": metadata.to_json()})
        onnx.save(exported, file)
    exported = ExportedPredictor(file)
    for size in ((60, 90), (300, 450), (90, 60), (77, 200)):
        expected, found = (
            Detections.from_instances(predictor.predict(noise(*size))["instances"]),
            exported(noise(*size)).detections,
        )
        assert len(found) == len(expected) > 0 and np.array_equal(found.classes, expected.classes)
        assert np.allclose(found.boxes, expected.boxes, atol=1e-2)
        assert np.allclose(found.scores, expected.scores, atol=1e-4)
        assert expected.masks.sum() > 100 and (found.masks != expected.masks).sum() <= 1e-3 * expected.masks.sum()
        drawings = [draw(noise(*size), results, ["a", "b"], threshold=0.5) for results in (expected, found)]
        assert (drawings[0] != drawings[1]).mean() < 0.02


@pytest.fixture(scope="module")
def run_folder(trained, tmp_path_factory):
    """The OUTPUT_DIR of a run: config.yaml, checkpoints, class names."""
    folder = tmp_path_factory.mktemp("output")
    cfg = trained.clone()
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    shutil.copy(trained.MODEL.WEIGHTS, folder / "model_final.pth")
    write_classes(folder / "classes.json", [{"id": 5, "name": "nut"}, {"id": 3, "name": "fig"}])
    return folder


def test_from_pretrained_loads_a_run_or_a_config(trained, run_folder):
    image = noise(60, 90)
    expected = Predictor(trained).predict(image)["instances"]
    expected = expected[expected.scores > 0.5]
    weights = run_folder / "model_final.pth"
    for arguments in ((run_folder,), (str(run_folder),), (run_folder / "config.yaml", weights)):
        predictor = Predictor.from_pretrained(*arguments)
        assert [entry["name"] for entry in predictor.classes] == ["nut", "fig"]
        found = predictor(image)
        assert len(found) == len(expected) > 0 and np.allclose(found.boxes, expected.pred_boxes.tensor.numpy())
        assert found.names == [["nut", "fig"][k] for k in expected.pred_classes]
    assert Predictor.from_pretrained(run_folder, device=torch.device("cpu")).cfg.MODEL.DEVICE == "cpu"
    opts = ("MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.9")
    assert Predictor.from_pretrained(run_folder, device="cpu", opts=opts).cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.9


def test_from_pretrained_takes_the_latest_checkpoint(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    checkpoint = torch.load(folder / "model_final.pth", weights_only=False)
    for value in checkpoint["model"].values():
        value.zero_()
    torch.save(checkpoint, folder / "model_0000009.pth")
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    assert not Predictor.from_pretrained(folder).model.roi_heads.box_predictor.cls_score.weight.any()
    (folder / "model_0000009.pth").unlink()
    assert Predictor.from_pretrained(folder).model.roi_heads.box_predictor.cls_score.weight.any()
    (folder / "model_final.pth").unlink()
    with pytest.raises(CheckpointError, match=r"model_final\.pth"):
        Predictor.from_pretrained(folder)


def test_from_pretrained_names_what_is_wrong(run_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        Predictor.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="ExportedPredictor"):
        Predictor.from_pretrained("model.onnx")
    with pytest.raises(ConfigError, match=r"score_threshold=1\.5"):
        Predictor.from_pretrained(run_folder, score_threshold=1.5)
    for changed in ({"score_threshold": "0.3"}, {"opts": "A 1"}, {"opts": {"A": 1}}):
        with pytest.raises(ConfigError, match=next(iter(changed))):
            Predictor.from_pretrained(run_folder, **changed)
    with pytest.raises(ConfigError, match=r"model_final\.pth is a checkpoint.*Fix: give .*output"):
        Predictor.from_pretrained(run_folder / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS is empty.*Fix: give the folder .*output"):
        Predictor.from_pretrained(run_folder / "config.yaml")
    with pytest.raises(ConfigError, match="from_pretrained"):
        Predictor(str(run_folder))
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE=cuba"):
        Predictor.from_pretrained(run_folder, device="cuba")
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        Predictor.from_pretrained(run_folder, "none.pth")
