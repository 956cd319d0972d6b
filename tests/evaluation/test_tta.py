"""Test-time augmentation against its two passes, merged by an independent computation."""

import json

from halodet.config.load import load_config
from halodet.engine.startup import build_meta_model
from halodet.errors import ConfigError

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

HEIGHT, WIDTH = 64, 96
FLIP = [
    "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)", "MODEL.HALONET.BASE_WIDTH", "16",
    "TEST.DETECTIONS_PER_IMAGE", "12",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def detector():
    """A detector of random weights whose scores differ from box to box: (cfg, model)."""
    cfg = load_config("quick/mask_rcnn_halo_shapes", FLIP)
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(10)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(30)
        model.roi_heads.mask_head.predictor.weight.mul_(300)
    return cfg, model


def overlap(a, b):
    """Intersection over union of two boxes."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def mirrored(boxes):
    return np.stack([WIDTH - boxes[:, 2], boxes[:, 1], WIDTH - boxes[:, 0], boxes[:, 3]], axis=1)


def best_of(boxes, scores, classes, *, threshold, most):
    """Which boxes stay: in falling order of score, those that no better one of their class covers."""
    kept = []
    for i in np.argsort(-scores):
        if all(classes[i] != classes[j] or overlap(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept[:most]


@torch.no_grad()
def test_a_flip_is_the_union_of_both_passes(detector):
    cfg, model = detector
    image = (torch.rand(3, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0)) * 255).round()
    image = image.repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    inputs = [{"image": image}, {"image": image.flip(2)}]

    plain, flipped = (model.inference([x], do_postprocess=False)[0] for x in inputs)
    assert len(plain) > 3 and len(flipped) > 3
    boxes = np.concatenate([plain.pred_boxes.tensor.numpy(), mirrored(flipped.pred_boxes.tensor.numpy())])
    scores, classes = (
        np.concatenate([getattr(x, name).numpy() for x in (plain, flipped)]) for name in ("scores", "pred_classes")
    )
    kept = best_of(boxes, scores, classes, threshold=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, most=12)
    assert len(kept) < len(boxes) and {i < len(plain) for i in kept} == {True, False}, (
        "both passes must bring in something, and lose"
    )

    # The masks: probabilities of both passes for the merged boxes, averaged.
    size = (HEIGHT, WIDTH)
    fields = {"scores": torch.tensor(scores[kept]), "pred_classes": torch.tensor(classes[kept])}
    merged = [
        Instances(size, pred_boxes=Boxes(torch.tensor(b).float()), **fields)
        for b in (boxes[kept], mirrored(boxes[kept]))
    ]
    probabilities = [
        model.inference([x], [m], do_postprocess=False)[0].pred_masks for x, m in zip(inputs, merged, strict=True)
    ]
    merged[0].pred_masks = (probabilities[0] + probabilities[1].flip(3)) / 2
    expected = detector_postprocess(merged[0], *size)

    found = GeneralizedRCNNWithTTA(cfg, model)([{"image": image, "height": HEIGHT, "width": WIDTH}])[0]["instances"]
    torch.testing.assert_close(found.scores, torch.tensor(scores[kept]), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=1e-3)
    assert found.pred_classes.tolist() == classes[kept].tolist()
    differ = (found.pred_masks != expected.pred_masks).float().mean()
    assert found.pred_masks.any() and differ < 1e-3


def test_every_size_is_taken(detector):
    cfg, model = detector
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.AUG.MIN_SIZES = (32, 48)
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    augmented = GeneralizedRCNNWithTTA(cfg, model).tta_mapper({"image": image, "height": HEIGHT, "width": WIDTH})
    shapes = [tuple(x["image"].shape[1:]) for x in augmented]
    assert shapes == [
        shape for s in (32, 48) for shape in [ResizeShortestEdge.get_output_shape(HEIGHT, WIDTH, s, 4000)] * 2
    ]


def test_results_are_named_and_filed_apart_during_and_after_training(tmp_path, train_net, metrics, capsys):
    aug = [
        "TEST.AUG.ENABLED",
        "True",
        "TEST.AUG.MIN_SIZES",
        "(48, 64)",
        "SOLVER.MAX_ITER",
        "2",
        "TEST.EVAL_PERIOD",
        "1",
    ]
    assert train_net(tmp_path / "run", *aug, "MODEL.EMA.ENABLED", "True") == 0
    rows = metrics(tmp_path / "run")
    assert [("bbox_TTA/AP" in row, "ema/bbox_TTA/AP" in row) for row in rows if "bbox/AP" in row] == [
        (False, False),
        (True, True),
    ]
    assert {"segm_TTA/AP", "ema/segm_TTA/AP"} <= set(rows[-1])
    weights = ["MODEL.WEIGHTS", tmp_path / "run/model_final.pth"]
    assert train_net(tmp_path / "again", *aug, *weights, flags=["--eval-only"]) == 0
    files = [
        folder / "coco_instances_results.json"
        for folder in (tmp_path / "run/inference_TTA", tmp_path / "again/inference_TTA")
    ]
    detections = [json.loads(file.read_text()) for file in files]
    assert (
        detections[0]
        == detections[1]
        != json.loads((tmp_path / "again/inference/coco_instances_results.json").read_text())
    )


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (
            "retinanet_halo_h4",
            [],
            "TEST.AUG.ENABLED.*RetinaNet",
        ),
        (
            "quick/mask_rcnn_halo_shapes",
            ["TEST.AUG.MIN_SIZES", "()"],
            r"MIN_SIZES=\(\)",
        ),
        (
            "quick/mask_rcnn_halo_shapes",
            ["TEST.AUG.MAX_SIZE", "1000"],
            "MAX_SIZE=1000",
        ),
    ],
)
def test_unsupported_config_is_an_error(config, opts, message):
    cfg = load_config(config, ["TEST.AUG.ENABLED", "True", *opts])
    with pytest.raises(ConfigError, match=message):
        build_meta_model(cfg)
