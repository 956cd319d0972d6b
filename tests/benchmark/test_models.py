"""Models to compare: equal pyramids, equal work in the heads, training steps that reach every parameter."""

from halodet.benchmark import models
from halodet.errors import ConfigError

import pytest
import torch

CASE = models.Case(70, 101)
SMALL = "quick/mask_rcnn_halo_small"


@pytest.fixture
def small_heads(monkeypatch):
    """Patch Detectron2's config with small heads."""
    cfg = models._detectron2_config()
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.TEST.DETECTIONS_PER_IMAGE = 12
    monkeypatch.setattr(models, "_detectron2_config", cfg.clone)


def check_training(model, kind, case=CASE):
    model.train()
    out = models.backward(model, models.make_inputs(kind, case), case)
    assert all(torch.isfinite(value).all() for value in out.values())
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not torch.isfinite(grad).all()] == []
    return out


def check_pyramid(model, case=CASE):
    with torch.no_grad():
        maps = models.build_call(model, "backbone", "forward", case)()
    padded = 96, 128  # of 70×101
    assert {name: tuple(y.shape) for name, y in maps.items()} == {
        f"p{level}": (case.batch, 256, -(-padded[0] // 2**level), -(-padded[1] // 2**level)) for level in range(2, 7)
    }
    assert [shape.stride for shape in model.output_shape().values()] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize("name", [*models.OURS, "R50-FPN", "Swin-T-FPN"])
def test_pyramid_and_training_step(name):
    model = models.build_model(name, "backbone", CASE)
    check_pyramid(model)
    check_training(model, "backbone")


@pytest.mark.slow
def test_vitdet_b(small_heads):
    model = models.build_model("ViTDet-B", "detector", CASE)
    check_pyramid(model.backbone)
    check_training(model, "detector")
    assert models.describe(model.backbone.net)["parameters"] == pytest.approx(85.9, abs=0.1)


@pytest.mark.parametrize("name", ["mask_rcnn_halo_h4", "R50-FPN"])
def test_detector_training_step(name, small_heads):
    losses = check_training(models.build_model(name, "detector", CASE), "detector")
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert all(loss > 0 for loss in losses.values())


def test_training_call_keeps_weights_and_frees_gradients():
    model = models.build_model(SMALL, "backbone", CASE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    models.build_call(model, "backbone", "training", CASE)()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_detections_do_not_depend_on_the_backbone(small_heads):
    found = []
    for name in (SMALL, "R50-FPN"):
        model = models.build_model(name, "detector", CASE)
        (output,) = models.build_call(model, "detector", "forward", CASE)()
        found.append(output["instances"])
    ours, theirs = found
    assert len(ours) == 12 and ours.pred_masks.shape == (12, 70, 101)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor) and torch.equal(
        ours.pred_classes, theirs.pred_classes
    )


def test_heads_are_the_same_on_every_backbone():
    heads = []
    for name in ("mask_rcnn_halo_h4", "Swin-T-FPN"):
        model = models.build_model(name, "detector", CASE)
        heads.append({key: value.shape for key, value in model.state_dict().items() if not key.startswith("backbone.")})
    assert heads[0] == heads[1] and len(heads[0]) > 20
    assert heads[0]["roi_heads.box_head.fc1.weight"] == (1024, 256 * 7 * 7)


def test_description():
    ours, theirs = (
        models.describe(models.build_model(name, "backbone", CASE)) for name in ("mask_rcnn_r50", "R50-FPN")
    )
    assert ours["norms"] == "SyncBN" and ours["trained"] == ours["parameters"]
    assert theirs["norms"] == "FrozenBN"
    frozen = (
        64 * 3 * 49 + (64 * 64 + 64 * 576 + 256 * 64 + 256 * 64) + 2 * (64 * 256 + 64 * 576 + 256 * 64)
    )  # stem and res2
    assert (theirs["parameters"] - theirs["trained"]) * 1e6 == pytest.approx(frozen)


def test_inputs_are_deterministic_and_inside_the_image():
    case = models.Case(70, 101, batch=2)
    first, again = (models.make_inputs("detector", case) for _ in range(2))
    assert len(first) == 2 and not torch.equal(first[0]["image"], first[1]["image"])
    for a, b in zip(first, again, strict=True):
        assert a["image"].shape == (3, 70, 101) and torch.equal(a["image"], b["image"])
        boxes = a["instances"].gt_boxes.tensor
        assert torch.equal(boxes, b["instances"].gt_boxes.tensor) and len(boxes) == models.OBJECTS
        assert (boxes >= -1e-3).all() and (boxes <= torch.tensor([101, 70, 101, 70]) + 1e-3).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 5).all()
        torch.testing.assert_close(a["instances"].gt_masks.get_bounding_boxes().tensor, boxes)


def test_bfloat16_and_channels_last():
    case = models.Case(70, 101, dtype=torch.bfloat16, channels_last=True)
    model = models.build_model("mask_rcnn_r50_se_halo_b8h3", "backbone", case)
    maps = check_training(model, "backbone", case)
    assert {y.dtype for y in maps.values()} == {torch.bfloat16}
    assert model.bottom_up.res2[0].mixer.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "message"), [("retinanet_halo_h4", "p7"), ("no_such_config", "no_such_config")])
def test_check_config_raises(name, message):
    with pytest.raises(ConfigError, match=message):
        models.check_config(name)
