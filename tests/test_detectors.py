"""Whole detectors: a training step and inference on a batch of images of different sizes."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import cached_config

SMALL = [
    "MODEL.HALONET.DEPTHS", "(1, 1, 1, 2)", "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.HALONET.NORM", "GN",
    "MODEL.FPN.NORM", "",
    "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32",
    "INPUT.MASK_FORMAT", "bitmask",
]  # fmt: skip
CONFIGS = [
    "mask_rcnn_halo_h4",
    "cascade_mask_rcnn_halo_h4",
    "faster_rcnn_halo_h4",
    "retinanet_halo_h4",
    "mask_rcnn_r50_se_halo_b32h3",
]


def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for height, width in [(90, 131), (161, 77)]:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 60.0, 70.0], [20.0, 20.0, 50.0, 85.0]]))
        instances.gt_classes = torch.tensor([3, 40])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 8:70, 5:60], masks[1, 20:85, 20:50] = True, True
        instances.gt_masks = BitMasks(masks)
        image = torch.rand(3, height, width, generator=generator) * 255
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("border", ["mask", "zero"])
def test_training_step_gives_gradients_everywhere(name, border):
    torch.manual_seed(0)
    model = build_model(cached_config(name, *SMALL, "MODEL.HALONET.BORDER", border)).train()
    with EventStorage():
        losses = model(batch())
    assert len(losses) >= 2 and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for part in ("stem", "res2", "res3", "res4", "res5"):
        gradients = [p.grad for p in getattr(model.backbone.bottom_up, part).parameters() if p.grad is not None]
        assert (
            gradients and all(torch.isfinite(g).all() for g in gradients) and sum(g.abs().sum() for g in gradients) > 0
        )


@pytest.mark.parametrize("name", CONFIGS[:4])
def test_inference_returns_the_size_of_each_image(name):
    torch.manual_seed(0)
    model = build_model(
        cached_config(
            name, *SMALL, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"
        )
    )
    # nonzero branches, so that boxes differ from their anchors
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.fill_(0.5)
    model.eval()
    inputs = batch()
    with torch.no_grad():
        results = [output["instances"] for output in model(inputs)]
    for given, found in zip(inputs, results, strict=True):
        assert found.image_size == (given["height"], given["width"])
        assert len(found) > 5 and (found.pred_boxes.area() > 1).all(), "degenerate detections"
        boxes = found.pred_boxes.tensor
        assert (boxes >= 0).all() and (boxes[:, 2] <= given["width"]).all() and (boxes[:, 3] <= given["height"]).all()
        if found.has("pred_masks"):
            assert found.pred_masks.shape[1:] == (given["height"], given["width"])
