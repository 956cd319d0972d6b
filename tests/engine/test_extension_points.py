"""A user's own dataset function, config keys, head, mapper, loader, evaluator, hook and Trainer, as with Detectron2."""

import copy
import itertools
import json
import logging
import os
import re
import sys
from pathlib import Path

from halodet.config import load_config
from halodet.data.coco_records import register_cleaned
from halodet.engine import Trainer
from halodet.errors import DatasetError, ImageError
from halodet.evaluation.build import build_evaluator

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from helpers import assert_same_tensors, read_metrics
from PIL import Image
from pycocotools.coco import COCO
from small_run import TRAIN, VAL, make_trainer, register_tiny_shapes

PROJECT = '''
import torch
from detectron2.config import CfgNode as CN
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead


def add_stretch_config(cfg):
    cfg.MODEL.STRETCH = CN()
    cfg.MODEL.STRETCH.FACTOR = 1.0


@ROI_BOX_HEAD_REGISTRY.register()
class StretchHead(FastRCNNConvFCHead):
    """Needs the value of a tensor in its constructor, which tensors on the meta device do not have."""

    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self.factor = float(torch.tensor(cfg.MODEL.STRETCH.FACTOR))

    def forward(self, x):
        print("factor", self.factor)
        return self.factor * super().forward(x)


DatasetCatalog.register("my_photos", lambda: load_coco_json({json!r}, {images!r}, "my_photos"))
'''


@pytest.fixture
def project(scenes, tmp_path):
    """Path of a project's file: a dataset function, config keys, and a head."""
    json_file, images = (flag.partition("=")[2] for flag in scenes[:2])
    path = tmp_path / "stretch_project.py"
    path.write_text(PROJECT.format(json=json_file, images=images))
    yield path
    sys.modules.pop(path.stem, None)
    sys.path.remove(str(tmp_path))
    DatasetCatalog.remove("my_photos")
    MetadataCatalog.remove("my_photos")


def test_a_project_trains_through_our_tool(project, tool, tmp_path, capfd):
    tiny = [
        "MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0",
    ]  # fmt: skip
    data = ["DATASETS.TRAIN", "('my_photos', 'my_photos')", "DATASETS.TEST", "('my_photos',)"]
    head = ["MODEL.ROI_BOX_HEAD.NAME", "StretchHead", "MODEL.STRETCH.FACTOR", "0.5"]
    command = ["--config-file=quick/mask_rcnn_halo_shapes", f"--import={project}", "OUTPUT_DIR", str(tmp_path / "out")]
    assert tool([*command, *tiny, *data, *head]) == 0
    printed = "".join(capfd.readouterr())
    assert "factor 0.5" in printed and "Evaluation results for bbox" in printed
    assert "FACTOR: 0.5" in (tmp_path / "out/config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import no_such_package", "ModuleNotFoundError.*no_such_package"),
        ("1 / 0", "ZeroDivisionError"),
        ("def add_my_config(cfg): cfg.NOTHING.KEY = 1", "add_my_config.*NOTHING"),
    ],
)
def test_a_module_that_fails_is_one_message(tool, tmp_path, capsys, text, named):
    path = tmp_path / f"failing_{len(text)}.py"
    path.write_text(text)
    code = tool(["--config-file=quick/mask_rcnn_halo_shapes", f"--import={path}", "OUTPUT_DIR", str(tmp_path / "out")])
    log = "".join(capsys.readouterr())
    assert code == 2 and log.count("ERROR") == 1 and "Traceback" not in log
    assert re.search(named, log), log


def failing():
    raise RuntimeError("the server is down")


@pytest.mark.parametrize(
    ("load", "named"),
    [
        (failing, "RuntimeError: the server is down"),
        (lambda: {"images": []}, "dict"),
        (lambda: [{"image_id": 1}], "entry 0 .*'file_name'"),
        (lambda: ["a.jpg"], "entry 0 .*a.jpg"),
    ],
)
def test_a_dataset_function_that_is_wrong_is_one_message(tool, tmp_path, capsys, load, named):
    DatasetCatalog.register("my_function", load)
    try:
        data = ["DATASETS.TRAIN", "('my_function',)", "DATASETS.TEST", "('my_function',)"]
        code = tool(["--config-file=quick/mask_rcnn_halo_shapes", "OUTPUT_DIR", str(tmp_path / "out"), *data])
    finally:
        DatasetCatalog.remove("my_function")
    log = "".join(capsys.readouterr())
    assert code == 2 and log.count("ERROR") == 1 and "Traceback" not in log
    assert re.search(named, log), log


def test_an_evaluator_type_nobody_knows(tmp_path):
    MetadataCatalog.get("strange").set(evaluator_type="beauty")
    cfg = load_config("quick/mask_rcnn_halo_shapes", ["OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(DatasetError, match="strange.*beauty.*coco_panoptic_seg"):
        build_evaluator(cfg, "strange")
    MetadataCatalog.remove("strange")


class CountImages(DatasetEvaluator):
    def reset(self):
        self.count = 0

    def process(self, inputs, outputs):
        self.count += len(inputs)

    def evaluate(self):
        return {"images": {"count": self.count}}


class CountSteps(HookBase):
    steps = 0

    def after_step(self):
        self.steps += 1


class MyTrainer(Trainer):
    """What a user of Detectron2 overrides."""

    @classmethod
    def build_train_loader(cls, cfg):
        mapper = DatasetMapper(cfg, is_train=True, augmentations=[T.Resize((48, 48))])
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return CountImages()

    def build_hooks(self):
        self.counter = CountSteps()
        return [*super().build_hooks(), self.counter]


def test_a_trainer_subclass_with_its_own_loader_evaluator_and_hook(shapes, tmp_path, caplog):
    options = {"SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 2, "DATASETS.TEST": f"('{VAL}',)"}
    trainer = make_trainer(tmp_path, options, trainer=MyTrainer)
    trainer.train()
    assert trainer.counter.steps == 3
    assert read_metrics(tmp_path)[-1]["images/count"] == 2
    assert sum("is not halodet's" in record.message for record in caplog.records) == 1
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 2
    resumed = make_trainer(tmp_path, options, {"SOLVER.MAX_ITER": 4}, trainer=MyTrainer)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert resumed.start_iter == 3 and resumed.counter.steps == 1


class FolderTrainer(MyTrainer):
    folders: list = []

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):  # with the arguments of DefaultTrainer
        cls.folders.append(cfg.OUTPUT_DIR)
        return CountImages()


def test_an_evaluator_of_the_own_trainer_evaluates_the_average_too(shapes, tmp_path):
    options = {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": f"('{VAL}',)", "MODEL.EMA.ENABLED": True}
    make_trainer(tmp_path, options, trainer=FolderTrainer).train()
    assert [os.path.relpath(folder, tmp_path) for folder in FolderTrainer.folders] == [".", "inference_ema"]
    assert [row["ema/images/count"] for row in read_metrics(tmp_path) if "ema/images/count" in row] == [2]


def test_messages_reach_the_log_of_a_program_that_sets_up_detectron2s(shapes, tmp_path):
    log = logging.getLogger("halodet")
    before, log.handlers = (log.handlers, log.propagate, log.level), []
    try:
        make_trainer(tmp_path, {"SOLVER.MAX_ITER": 1})
        for handler in log.handlers:
            handler.flush()
        assert "Parameter groups" in (tmp_path / "log.txt").read_text()
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


def test_several_datasets_at_once(shapes, tmp_path):
    register_tiny_shapes()
    trainer = make_trainer(tmp_path, {"DATASETS.TRAIN": f"('{TRAIN}', '{VAL}')"})
    samples = [sample for batch in itertools.islice(trainer.data_loader, 14) for sample in batch]
    trainer.data_loader.close()
    assert {Path(sample["file_name"]).parent.name for sample in samples} == {"train", "val"}


def test_keypoints_of_user_data_train_save_and_resume(scenes, tool, tmp_path, capsys):
    json_file, images = (flag.partition("=")[2] for flag in scenes[:2])
    data = json.loads(Path(json_file).read_text())
    for category in data["categories"]:
        category["keypoints"] = ["left_top", "right_top", "middle"]
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["keypoints"] = [x + 1, y + 1, 2, x + w - 1, y + 1, 2, x + w / 2, y + h / 2, 1]
    data["annotations"][0]["keypoints"] = [1, 2]
    path = tmp_path / "keypoints.json"
    path.write_text(json.dumps(data))
    command = ["--config-file=quick/mask_rcnn_halo_shapes"]
    for split in ("train", "val"):
        command += [f"--{split}-json={path}", f"--{split}-images={images}"]
    opts = [
        "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.KEYPOINT_ON", "True", "MODEL.MASK_ON", "False",
        "MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SOLVER.CHECKPOINT_PERIOD", "2",
    ]  # fmt: skip
    assert tool([*command, *opts, "SOLVER.MAX_ITER", "2"]) == 2
    assert "TEST.KEYPOINT_OKS_SIGMAS" in "".join(capsys.readouterr())
    opts += ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"]
    assert tool([*command, *opts, "SOLVER.MAX_ITER", "2"]) == 0
    log = "".join(capsys.readouterr())
    assert "Evaluation results for keypoints" in log and "keypoints=[1, 2]" in log
    cleaned = tmp_path / "out/data/user_train.json"
    register_cleaned("cleaned_keypoints", cleaned)
    metadata = MetadataCatalog.get("cleaned_keypoints")
    assert metadata.keypoint_names == ["left_top", "right_top", "middle"]
    assert metadata.keypoint_flip_map == [("left_top", "right_top")]
    DatasetCatalog.remove("cleaned_keypoints")
    MetadataCatalog.remove("cleaned_keypoints")
    first = min(json.loads(cleaned.read_text())["annotations"], key=lambda annotation: annotation["id"])
    assert (first["keypoints"], first["num_keypoints"]) == ([0] * 9, 0), "invalid ones are not labeled"
    assert tool(["--resume", *command, *opts, "SOLVER.MAX_ITER", "3"]) == 0
    assert "Starting training from iteration 2" in "".join(capsys.readouterr())
    loss = [row["loss_keypoint"] for row in read_metrics(tmp_path / "out") if "loss_keypoint" in row]
    assert loss and all(value > 0 for value in loss)


@pytest.fixture
def labels(scenes, tmp_path):
    """Name of a dataset for semantic segmentation: four scenes with a label image each, 6 for the background."""
    coco, images = COCO(scenes[0].partition("=")[2]), Path(scenes[1].partition("=")[2])
    records = []
    for image in coco.imgs.values():
        label = np.full((image["height"], image["width"]), 6, np.uint8)
        for annotation in coco.imgToAnns[image["id"]]:
            label[coco.annToMask(annotation) > 0] = annotation["category_id"] - 1
        path = tmp_path / f"label{image['id']}.png"
        Image.fromarray(label).save(path)
        files = {"file_name": str(images / image["file_name"]), "sem_seg_file_name": str(path)}
        records.append({**files, "image_id": image["id"], "height": image["height"], "width": image["width"]})
    classes = [category["name"] for category in coco.dataset["categories"]] + ["background"]
    DatasetCatalog.register("my_labels", lambda: copy.deepcopy(records))
    MetadataCatalog.get("my_labels").set(evaluator_type="sem_seg", stuff_classes=classes, ignore_label=255)
    yield "my_labels"
    DatasetCatalog.remove("my_labels")
    MetadataCatalog.remove("my_labels")


SEMANTIC = [
    "MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False",
    "MODEL.MASK_ON", "False", "MODEL.HALONET.BASE_WIDTH", "16", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "30",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.WARMUP_ITERS", "5", "DATALOADER.MAX_BAD_IMAGES", "1.0",
    "DATASETS.TRAIN", "('my_labels',)", "DATASETS.TEST", "('my_labels',)",
]  # fmt: skip


def test_bad_label_images_are_skipped(labels, tool, tmp_path):
    (tmp_path / "label0.png").write_bytes(b"not an image")
    Image.new("L", (3, 3)).save(tmp_path / "label1.png")
    records = DatasetCatalog.get("my_labels")
    command = ["--config-file=quick/mask_rcnn_halo_shapes", "OUTPUT_DIR", str(tmp_path / "out"), *SEMANTIC]
    assert tool([*command, "DATASETS.TRAIN", "('my_labels', 'my_labels', 'my_labels')", "DATASETS.TEST", "()"]) == 0
    skipped = json.loads((tmp_path / "out/skipped.json").read_text())["files"]
    reasons = {entry["file"]: entry["reason"] for entry in skipped}
    assert "label0.png" in reasons[records[0]["file_name"]] and "3 x 3" in reasons[records[1]["file_name"]]
    assert len(reasons) == 2


def test_semantic_segmentation_trains_and_is_evaluated(labels, tool, tmp_path):
    assert tool(["--config-file=quick/mask_rcnn_halo_shapes", "OUTPUT_DIR", str(tmp_path / "out"), *SEMANTIC]) == 0
    results = read_metrics(tmp_path / "out")[-1]
    assert results["sem_seg/pACC"] > 50 and results["sem_seg/mIoU"] > 5
    assert not (tmp_path / "out/classes.json").exists(), "the dataset has no things"


def test_an_unreadable_image_ends_an_evaluation_that_cannot_leave_it_out(labels, tmp_path):
    records = DatasetCatalog.get(labels)
    records[2]["file_name"] = str(tmp_path / "missing.jpg")
    DatasetCatalog.remove(labels)
    DatasetCatalog.register(labels, lambda: records)
    cfg = load_config("quick/mask_rcnn_halo_shapes", [*SEMANTIC, "OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(ImageError, match="missing.jpg"):
        list(Trainer.build_test_loader(cfg, labels))


@pytest.mark.parametrize("overridden", [False, True], ids=["DefaultTrainer", "own optimizer"])
@pytest.mark.usefixtures("shapes")
def test_detectron2s_trainer_says_which_keys_it_ignores(tmp_path, caplog, overridden):
    class OwnOptimizer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return torch.optim.AdamW(model.parameters(), cfg.SOLVER.BASE_LR)

    keys = {"SOLVER.MAX_ITER": 2, "SOLVER.GRAD_ACCUM_STEPS": 3, "SOLVER.WARMUP_ITERS": 1}
    trainer = make_trainer(tmp_path, keys, trainer=OwnOptimizer if overridden else DefaultTrainer)
    found = [record.getMessage() for record in caplog.records if "DefaultTrainer ignores" in record.getMessage()]
    if overridden:
        assert not found
        return
    (message,) = found
    assert "SOLVER.OPTIMIZER_NAME=AdamW, SOLVER.GRAD_ACCUM_STEPS=3" in message and "EMA" not in message
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    trainer.train()
    # Detectron2's checkpoint is read by halodet's trainer as initial weights, and halodet's by Detectron2's.
    ours = make_trainer(tmp_path / "ours", {"MODEL.WEIGHTS": str(tmp_path / "model_final.pth"), "SOLVER.MAX_ITER": 1})
    ours.resume_or_load(resume=False)
    # a new training counts its own batches
    states = [t.model.state_dict() for t in (ours, trainer)]
    assert_same_tensors(*({k: v for k, v in state.items() if "num_batches" not in k} for state in states))
    ours.train()
    theirs = DetectionCheckpointer(trainer.model).load(str(tmp_path / "ours/model_final.pth"))
    assert "trainer" in theirs
    assert_same_tensors(ours.model.state_dict(), trainer.model.state_dict())
