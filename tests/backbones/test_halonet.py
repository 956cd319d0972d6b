"""HaloNet as a Detectron2 backbone: registry, config, norms and freezing."""

import dataclasses

from halodet.backbones import HaloNetBackbone
from halodet.config.defaults import add_halodet_config
from halodet.errors import ConfigError
from halodet.models import VARIANTS, HaloNet

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.modeling import Backbone, build_backbone

SMALL = dataclasses.replace(
    VARIANTS["H0"],
    depths=(1, 2, 1, 2),
    mixers=("conv", ("conv", "halo"), "halo", "halo"),
    base_width=16,
    stem_channels=16,
    num_heads=(2,) * 4,
)


def test_config_gives_the_module_with_the_same_state_dict():
    cfg = get_cfg()
    add_halodet_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_halonet_backbone", 0
    cfg.MODEL.HALONET.VARIANT, cfg.MODEL.HALONET.DEPTHS = "H1", [1, 1, 2, 1]
    cfg.MODEL.HALONET.MIXERS = ["conv", "conv", ["halo", "botnet"], "halo"]
    cfg.MODEL.HALONET.merge_from_other_cfg(type(cfg)({"MIXER_OPTIONS": {"botnet": {"window": 4}}}))
    variant = dataclasses.replace(
        VARIANTS["H1"], depths=(1, 1, 2, 1), mixers=("conv", "conv", ("halo", "botnet"), "halo")
    )
    with torch.device("meta"):
        backbone, model = build_backbone(cfg), HaloNet(variant)
    assert isinstance(backbone, Backbone) and backbone.variant == variant
    assert backbone.res4[1].mixer.window == 4
    assert {n: t.shape for n, t in backbone.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_output_shape():
    model = HaloNetBackbone(SMALL, out_features=["stem", "res4"])
    maps = model(torch.randn(1, 3, 70, 33))
    shapes = model.output_shape()
    assert list(shapes) == list(maps) == ["stem", "res4"] and [s.stride for s in shapes.values()] == [4, 16]
    assert [x.shape[1] for x in maps.values()] == [s.channels for s in shapes.values()]


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", "GN"])
def test_norms_are_detectron2s(norm):
    model = HaloNetBackbone(SMALL, norm=norm)
    assert type(model.res3[0].norm2) is type(get_norm(norm, 32))
    assert isinstance(HaloNetBackbone("H2", norm="GN", out_features=["res2"]).res2[0].conv3.norm, torch.nn.GroupNorm)


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at(freeze_at):
    model = HaloNetBackbone(SMALL, freeze_at=freeze_at)
    parts = [model.stem, *model.stages]
    assert [not any(p.requires_grad for p in part.parameters()) for part in parts] == [i < freeze_at for i in range(5)]
    for index, part in enumerate(parts):
        assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules()) == (index < freeze_at)


@pytest.mark.parametrize("name", ["build_halonet_backbone", "build_halodet_timm_backbone"])
def test_a_config_without_halodets_keys_is_named(name):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    with pytest.raises(ConfigError, match="add_halodet_config"):
        build_backbone(cfg)


def test_random_weights_that_stay_frozen_are_named(caplog):
    cfg = get_cfg()
    add_halodet_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_halonet_backbone"
    for freeze_at, weights, warned in ((2, "", True), (2, "a.pth", False), (0, "", False)):
        cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.WEIGHTS = freeze_at, weights
        caplog.clear()
        with torch.device("meta"):
            build_backbone(cfg)
        assert ("FREEZE_AT 2 freezes" in caplog.text) == warned
