"""Class names in checkpoints: predictors follow the names, and other classes are noticed."""

import json
from pathlib import Path

from halodet.checkpoint import Checkpointer, load_weights
from halodet.checkpoint.class_names import classes_of, is_predictor, select_classes
from halodet.data.classes import dataset_classes
from halodet.errors import CheckpointError

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from helpers import cached_config

OLD, NEW = ["cat", "dog", "cow", "pig"], ["pig", "cat"]
SMALL = [
    "MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)", "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.HALONET.NORM", "GN",
    "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.FPN.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", "", "MODEL.DEVICE", "cpu",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0",
    "TEST.DETECTIONS_PER_IMAGE", "1000",
]  # fmt: skip
CONFIGS = ["mask_rcnn_halo_h4", "cascade_mask_rcnn_halo_h4", "retinanet_halo_h4"]


def detector(name, classes, seed):
    torch.manual_seed(seed)
    count = str(len(classes))
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", count, "MODEL.RETINANET.NUM_CLASSES", count]
    model = build_model(cached_config(name, *SMALL, *keys)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.fill_(0.5)
    for key, weight in model.named_parameters():  # scores that differ
        if key.endswith("cls_score.weight"):
            torch.nn.init.normal_(weight, std=0.05 if "roi_heads" in key else 0.5)
    model.halodet_classes = [{"id": 10 * index + 7, "name": entry} for index, entry in enumerate(classes)]
    return model


def save(model, folder):
    Checkpointer(model, str(folder)).save("weights")
    return str(folder / "weights.pth")


@pytest.mark.parametrize(
    ("name", "owner"),
    [  # what each row belongs to
        ("roi_heads.box_predictor.cls_score.weight", [*OLD, "background"]),
        ("roi_heads.box_predictor.1.bbox_pred.bias", [entry for entry in OLD for _ in range(4)]),
        ("roi_heads.mask_head.predictor.weight", OLD),
        ("head.cls_score.bias", OLD * 3),
    ],
)
def test_rows_follow_the_names(name, owner):
    value = torch.arange(len(owner)) * 1.0
    names = set(NEW) | {"background"}
    kept = select_classes(name, value, OLD, NEW, 0)
    belongs = [owner[int(row)] for row in kept]
    template = {4: NEW, 5: [*NEW, "background"], 12: NEW * 3, 16: [entry for entry in NEW for _ in range(4)]}
    assert belongs == template[len(owner)] and set(belongs) <= names
    for entry in NEW:  # the rows of one class keep their order
        rows = [int(row) for row, of in zip(kept, belongs, strict=True) if of == entry]
        assert rows == [row for row, of in enumerate(owner) if of == entry]
    assert select_classes(name, value, OLD, ["horse"], 0) is None


def test_what_names_cannot_select_is_initialized():
    weight, name = torch.zeros(4, 2), "roi_heads.box_predictor.cls_score.weight"
    assert select_classes(name, weight, ["a", "a", "c"], ["c", "a", "a"], 4) is None
    for part in ("coarse_head.prediction", "point_head.predictor", "point_head.fc1"):  # PointRend's
        name = f"roi_heads.mask_head.{part}.weight"
        assert is_predictor(name) and select_classes(name, weight, ["a", "b"], ["b", "a"], 4) is None


@pytest.mark.parametrize("text", ['[{"id": Infinity, "name": "a"}]', "[1]", "{", "3"])
def test_metadata_of_another_program_names_no_classes(text):
    assert classes_of({"metadata": {"classes": text}}) is None


def test_a_models_own_attribute_is_left_alone(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.classes = ["a", "b"]
    save(model, tmp_path)
    assert model.classes == ["a", "b"]


def test_several_ids_of_one_class_are_one_class():
    ids = {1: 0, 2: 0, 3: 1}
    MetadataCatalog.get("test_merged").set(thing_classes=["car", "person"], thing_dataset_id_to_contiguous_id=ids)
    assert dataset_classes("test_merged") == [{"id": 1, "name": "car"}, {"id": 3, "name": "person"}]
    MetadataCatalog.remove("test_merged")


@pytest.mark.parametrize("name", CONFIGS)
def test_fine_tuning_on_the_same_names_in_another_order_keeps_the_detections(name, tmp_path):
    old = detector(name, OLD, seed=0)
    new = detector(name, OLD[::-1], seed=1)
    report = load_weights(new, save(old, tmp_path), min_loaded=0.9)
    assert report.share == 1.0 and not report.match.initialized
    image = {"image": torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0)) * 255}
    with torch.no_grad():
        expected, found = (model([image])[0]["instances"] for model in (old, new))
    assert len(expected) > 5 and len(expected.pred_classes.unique()) > 1, "degenerate detections"
    assert (expected.pred_boxes.area() > 1).all()
    torch.testing.assert_close(found.scores, expected.scores)
    # Close scores may change their order.
    rows = [
        torch.cat((fields.pred_boxes.tensor, 1000.0 * classes[:, None], 1000.0 * fields.scores[:, None]), 1)
        for fields, classes in ((expected, len(OLD) - 1 - expected.pred_classes), (found, found.pred_classes))
    ]
    nearest = torch.cdist(*rows, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 0.1
    if expected.has("pred_masks"):
        assert (found.pred_masks[nearest.indices] != expected.pred_masks).float().mean() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "without names"])
def test_predictors_of_other_classes_are_initialized(name, named, tmp_path):
    old, new = detector(name, ["thing"], seed=0), detector(name, [f"class {i}" for i in range(365)], seed=1)
    if not named:
        old.halodet_classes = None
    before = {key: value.clone() for key, value in new.state_dict().items()}
    report = load_weights(new, save(old, tmp_path), min_loaded=0.95)
    assert report.share == 1.0 and any("cls_score" in key for key in report.match.initialized)
    after, saved = new.state_dict(), old.state_dict()
    for key, value in after.items():
        assert torch.equal(value, before[key] if key in report.match.initialized else saved[key]), key


def test_other_classes_of_the_same_number_are_initialized(tmp_path):
    old, new = (detector(CONFIGS[0], classes, seed=0) for classes in (OLD, ["a", "b", "c", "d"]))
    initialized = load_weights(new, save(old, tmp_path), min_loaded=0.95).match.initialized
    assert {key.split(".")[-2] for key in initialized} == {"cls_score", "bbox_pred", "predictor"}


def test_a_complete_checkpoint_of_other_classes_is_refused(tmp_path):
    file = save(detector(CONFIGS[0], OLD, seed=0), tmp_path)
    with pytest.raises(CheckpointError, match="pig.*cat"):
        load_weights(detector(CONFIGS[0], OLD[::-1], seed=1), file)


def test_labels_do_not_swap_when_ids_are_exchanged(scenes, train_net, tmp_path, capsys):
    file, folder = (flag.partition("=")[2] for flag in scenes[:2])
    data = json.loads(Path(file).read_text())
    first, second = data["categories"][:2]
    first["id"], second["id"] = second["id"], first["id"]
    for annotation in data["annotations"]:
        annotation["category_id"] = {1: 2, 2: 1}.get(annotation["category_id"], annotation["category_id"])
    (tmp_path / "exchanged.json").write_text(json.dumps(data))
    values = {"json": tmp_path / "exchanged.json", "images": folder}
    exchanged = [f"--{split}-{key}={value}" for split in ("train", "val") for key, value in values.items()]
    assert train_net(tmp_path / "run", "SOLVER.MAX_ITER", "2") == 0
    weights = tmp_path / "alone" / "weights.pth"  # away from its classes.json
    weights.parent.mkdir()
    weights.write_bytes((tmp_path / "run" / "model_final.pth").read_bytes())
    capsys.readouterr()
    options = ["SOLVER.MAX_ITER", "3", "MODEL.WEIGHTS", weights]
    assert train_net(tmp_path / "run", *options, flags=[*exchanged, "--resume"]) == 2
    assert "circle, square" in "".join(capsys.readouterr()).replace("'", "")
    found = []
    for output, flags in (("evaluated", exchanged), ("original", scenes)):  # classes are matched by name
        assert train_net(tmp_path / output, *options, flags=[*flags, "--eval-only"]) == 0
        found.append((tmp_path / output / "inference/coco_instances_results.json").read_text())
    assert found[0] == found[1] and len(found[0]) > 100
    options = ["SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "1e-12", "MODEL.WEIGHTS", weights]
    assert train_net(tmp_path / "tuned", *options, flags=exchanged) == 0
    key = "roi_heads.box_predictor.cls_score.weight"
    before, after = (
        torch.load(f, weights_only=False)["model"][key] for f in (weights, tmp_path / "tuned/model_final.pth")
    )
    torch.testing.assert_close(after, before[[1, 0, *range(2, 7)]], rtol=1e-5, atol=1e-8)
