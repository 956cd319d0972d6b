"""Whole detectors: a training step and inference on a batch of images of different sizes."""

from typing import Dict, List, Tuple  # noqa: UP035  (what TorchScript takes)

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import cached_config

SMALL = [
    "MODEL.HALONET.DEPTHS", "(1, 1, 1, 2)", "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.HALONET.NORM", "GN",
    "MODEL.FPN.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", "",
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


def trained(name):
    """A detector whose branches are not zero, so that its boxes differ from their anchors."""
    torch.manual_seed(0)
    keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    model = build_model(cached_config(name, *SMALL, *keys))
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.data.fill_(0.5)
    return model.eval()


class Scriptable(torch.nn.Module):
    """What Detectron2's tools/deploy/export_model.py scripts: instances as dicts."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tuple[Dict[str, torch.Tensor]]) -> List[Dict[str, torch.Tensor]]:  # noqa: UP006
        instances = self.model.inference(inputs, do_postprocess=False)
        return [i.get_fields() for i in instances]


@pytest.mark.parametrize("form", ["traced", "scripted"])
def test_exported_detectors_give_the_same_detections(form):
    model, names = trained("mask_rcnn_halo_h4"), ["pred_boxes", "pred_classes", "pred_masks", "scores"]
    image, other = (sample["image"] for sample in batch())
    if form == "traced":
        infer = lambda model, inputs: [{"instances": model.inference(inputs, do_postprocess=False)[0]}]  # noqa: E731
        adapter = TracingAdapter(model, [{"image": image}], infer)
        graph = torch.jit.trace(adapter.eval(), (image,), check_trace=False)
        run = lambda x: dict(zip(names, graph(x), strict=False))  # noqa: E731
    else:
        types = {name: torch.Tensor for name in ("objectness_logits", *names[1:])}
        boxes = {"proposal_boxes": Boxes, "pred_boxes": Boxes}
        graph = scripting_with_instances(Scriptable(model).eval(), {**types, **boxes})
        run = lambda x: graph(({"image": x},))[0]  # noqa: E731
    for x in (image, other):
        with torch.no_grad():
            expected, found = model.inference([{"image": x}], do_postprocess=False)[0].get_fields(), run(x)
        assert len(expected["scores"]) > 5 and (expected["pred_boxes"].area() > 1).all(), "degenerate detections"
        for name in names:
            one, two = (getattr(fields[name], "tensor", fields[name]) for fields in (expected, found))
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS[:4])
def test_inference_returns_the_size_of_each_image(name):
    model, inputs = trained(name), batch()
    with torch.no_grad():
        results = [output["instances"] for output in model(inputs)]
    for given, found in zip(inputs, results, strict=True):
        assert found.image_size == (given["height"], given["width"])
        assert len(found) > 5 and (found.pred_boxes.area() > 1).all(), "degenerate detections"
        boxes = found.pred_boxes.tensor
        assert (boxes >= 0).all() and (boxes[:, 2] <= given["width"]).all() and (boxes[:, 3] <= given["height"]).all()
        if found.has("pred_masks"):
            assert found.pred_masks.shape[1:] == (given["height"], given["width"])
