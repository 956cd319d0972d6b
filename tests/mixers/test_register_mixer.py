"""The open mixer contract: a mixer defined in this file trains from a config, without a change to any other file."""

import logging

from halodet import load_config, register_mixer
from halodet.checkpoint import Checkpointer, ModelSpec, match
from halodet.config import config_dir
from halodet.engine import Trainer
from halodet.mixers import MIXERS, Mixer
from halodet.models import HaloNet, get_variant

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F


class ToyMixer(Mixer):
    """Separable depthwise convolution whose kernel is a relative position table, with a norm and an activation."""

    is_attention = True  # 3x3 weights of a ResNet have no place here
    rel_pos_tables = ("table",)

    def __init__(self, channels, stride, reach, norm, activation):
        super().__init__()
        if reach < 1:
            raise ValueError(f"reach={reach} is invalid: expected at least 1")
        self.out_channels, self.stride, self.reach = channels, stride, reach
        self.table = nn.Parameter(torch.randn(2 * reach + 1, channels) / (2 * reach + 1) ** 0.5)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.conv = nn.Conv2d(channels, channels, 1)
        self.norm, self.activation = norm(channels), activation()

    @classmethod
    def from_spec(cls, spec):
        return cls(spec.channels, spec.stride, norm=spec.norm, activation=spec.activation, **spec.read_options(reach=2))

    def forward(self, x):
        kernel = self.table.T[:, None, :, None].to(x.dtype)
        x = F.conv2d(x, kernel, stride=(self.stride, 1), padding=(self.reach, 0), groups=self.out_channels)
        kernel = kernel.transpose(2, 3)
        x = F.conv2d(x, kernel, stride=(1, self.stride), padding=(0, self.reach), groups=self.out_channels)
        return self.activation(self.norm(self.conv(x) * self.scale))

    def no_weight_decay(self):
        return {"table", "scale"}

    def rel_pos_layout(self):
        return {"reach": self.reach}

    def infer_rel_pos_layout(self, rows, metadata):
        return {"reach": rows // 2}

    def resize_rel_pos(self, table, layout):
        extra = self.reach - layout["reach"]
        return F.pad(table, (0, 0, extra, extra))


CONFIG = """
_BASE_: "{base}"
MODEL:
  HALONET:
    MIXERS: ["conv", "conv", "halo", "toy"]
    MIXER_OPTIONS:
      toy: {{reach: {reach}}}
SOLVER:
  OPTIMIZER_NAME: "AdamW"
  WEIGHT_DECAY: 0.05
  WEIGHT_DECAY_REL_POS: 0.02
"""
TABLE = "backbone.bottom_up.res5.0.mixer.table"


@pytest.fixture(autouse=True)
def registered():
    register_mixer("toy")(ToyMixer)
    yield
    del MIXERS["toy"]


@pytest.fixture
def config(tmp_path):
    def write(reach):
        path = tmp_path / f"reach{reach}.yaml"
        path.write_text(CONFIG.format(base=config_dir() / "quick/mask_rcnn_halo_shapes.yaml", reach=reach))
        return str(path)

    return write


def test_trains_from_a_config_and_resizes_its_table(config, train_net, tmp_path):
    keys = ["MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)", "SOLVER.MAX_ITER", "2"]
    assert train_net(tmp_path / "run", *keys, config=config(3)) == 0
    saved = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    table = saved["model"][TABLE]
    assert table.shape == (7, 128) and saved["metadata"].get("reach", "3") == "3"

    cfg = load_config(config(4), ["MODEL.HALONET.BASE_WIDTH", "16", *keys])
    model = Trainer.build_model(cfg)
    assert model.backbone.bottom_up.res5[0].mixer.reach == 4
    Checkpointer(model).load(str(tmp_path / "run/model_final.pth"))
    assert torch.equal(model.get_parameter(TABLE).cpu(), F.pad(table, (0, 0, 1, 1)))


def test_has_its_own_weight_decay(config):
    cfg = load_config(config(3), ["MODEL.HALONET.BASE_WIDTH", "16", "MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)"])
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    toy = {name.rpartition("mixer.")[2]: decay for name, decay in decays.items() if ".res5.0.mixer." in name}
    norm, bias = cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_BIAS
    assert toy == {
        "table": 0.02, "scale": 0.0, "conv.weight": 0.05, "conv.bias": bias, "norm.weight": norm, "norm.bias": bias
    }  # fmt: skip


def test_options_are_checked_by_the_mixer(config):
    cfg = load_config(config(3), ["MODEL.HALONET.MIXER_OPTIONS.toy.reach", "0"])
    with pytest.raises(ValueError, match="reach=0"):
        Trainer.build_model(cfg)
    with pytest.raises(ValueError, match="raech=3.*reach"):
        HaloNet(get_variant("H0", mixers=("conv", "conv", "halo", "toy")), mixer_options={"toy": {"raech": 3}})


@pytest.mark.parametrize("attention", [True, False])
def test_resnet_weights_load_around_it(attention, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ToyMixer, "is_attention", attention)
    cfg = load_config("mask_rcnn_r50_se", ["MODEL.HALONET.MIXERS", '["conv", "conv", "conv", "toy"]'])
    model = Trainer.build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resnet = torchvision.models.resnet50()
    torch.save(resnet.state_dict(), tmp_path / "r50.pth")
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "r50.pth"))
    loaded, prefix = model.state_dict(), "backbone.bottom_up."
    theirs = resnet.state_dict()
    assert torch.equal(loaded[f"{prefix}res4.5.mixer.conv.weight"], theirs["layer3.5.conv2.weight"])
    for block in range(3):
        for layer in (1, 3):
            name = f"{prefix}res5.{block}.conv{layer}.conv.weight"
            assert torch.equal(loaded[name], theirs[f"layer4.{block}.conv{layer}.weight"])
    toy = [name for name in before if name.startswith(f"{prefix}res5.") and ".mixer." in name]
    assert len(toy) >= 3 * 6 and all(torch.equal(before[name], loaded[name]) for name in toy)
    assert not match(ModelSpec.of(model), {"model": theirs}).mismatched


def test_convolution_with_more_parameters_takes_3x3_weights(monkeypatch):
    class Scaled(MIXERS["conv"]):
        def __init__(self, channels, *, stride=1):
            super().__init__(channels, stride=stride)
            self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    register_mixer("toy")(Scaled)
    with torch.device("meta"):
        model = HaloNet(get_variant("R50-SE", mixers=("conv", "conv", "conv", "toy")))
        file = torchvision.models.resnet50().state_dict()
    found = match(ModelSpec.of(model), {"model": file})
    assert {"res5.1.mixer.conv.weight", "res5.1.norm2.weight"} <= set(found.sources) and not found.unexpected
