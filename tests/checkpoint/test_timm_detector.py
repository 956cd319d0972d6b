"""timm's weights in a detector on timm's network: all of the backbone is filled, by this package and by plain
Detectron2."""

from halodet.checkpoint import Checkpointer, write_weights
from halodet.errors import CheckpointError

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import cached_config

timm = pytest.importorskip("timm", reason="timm is not installed")

SMALL = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "16",
]


def weights_of(name):
    torch.manual_seed(3)
    net = timm.create_model(name)
    for key, tensor in net.state_dict().items():
        if key.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("bn.bias", "running_mean")):
            tensor.normal_()
    return net.state_dict()


@pytest.fixture(scope="module")
def model():
    return build_model(cached_config("mask_rcnn_sehalonet33ts", *SMALL))


def learned(state_dict):
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if not key.startswith("head.") and not key.endswith("num_batches_tracked")
    }


def test_a_file_of_timm_fills_the_backbone(model, tmp_path):
    weights = weights_of("sehalonet33ts")
    write_weights(tmp_path / "timm.safetensors", weights)
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "timm.safetensors"))
    assert checkpointer.report.backbone_share == 1 and not checkpointer.report.match.unexpected
    assert sorted(checkpointer.report.match.unused) == ["head.fc.bias", "head.fc.weight"]
    inside = model.backbone.bottom_up.state_dict()
    assert set(inside) == set(learned(weights)) and all(
        torch.equal(inside[key], tensor) for key, tensor in learned(weights).items()
    )


def test_plain_detectron2_fills_it_too(model, tmp_path):
    weights = weights_of("sehalonet33ts")
    torch.save({"model": dict(weights), "matching_heuristics": True, "__author__": "timm"}, tmp_path / "timm.pth")
    for parameter in model.parameters():
        parameter.data.zero_()
    DetectionCheckpointer(model).load(str(tmp_path / "timm.pth"))
    inside = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(inside[key], tensor) for key, tensor in learned(weights).items())


def test_another_network_is_named(model, tmp_path):
    write_weights(tmp_path / "other.safetensors", weights_of("halonet26t"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="other.safetensors"):
        Checkpointer(model).load(str(tmp_path / "other.safetensors"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
