"""timm networks as backbones: the same feature maps at sizes that timm accepts, any size elsewhere."""

import re

from halodet.backbones import TimmBackbone
from halodet.backbones.timm_backbone import expected_input
from halodet.config import load_config

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed")

NETWORKS = (
    "eca_halonext26ts.c1_in1k", "halo2botnet50ts_256.a1h_in1k", "halonet26t.a1h_in1k", "halonet50ts.a1h_in1k",
    "haloregnetz_b.ra3_in1k",
    "lamhalobotnet50ts_256.a1h_in1k", "sehalonet33ts.ra2_in1k",
)  # fmt: skip
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def randomize(net, size):
    """Set batch norms that differ between channels, with statistics close to those of the features."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.weight.data = 0.5 + torch.rand(m.weight.shape, generator=generator)
        m.bias.data = 0.2 * torch.randn(m.bias.shape, generator=generator)
        m.momentum = None
    with torch.no_grad():
        net.train()(torch.randn(1, 3, size, size, generator=generator))
    for m in norms:
        m.momentum = 0.1
        # With random weights attention is nearly the mean of its window: a variance as small as that of its output
        # would magnify rounding.
        m.running_var += m.running_mean.square().mean()
        m.running_mean += 0.1 * m.running_var.sqrt() * torch.randn(m.running_mean.shape, generator=generator)
        m.running_var *= 0.8 + 0.4 * torch.rand(m.running_var.shape, generator=generator)
    return net.eval()


def timms(name):
    net = timm.create_model(name)
    return randomize(net, net.default_cfg["input_size"][-1])


def timms_maps(net, x, last="res5"):
    maps, x = {}, net.stem(x)
    for feature, stage in zip(STRIDES, net.stages, strict=True):
        maps[feature] = x = stage(x)
        if feature == last:
            break
    return {**maps, "res5": net.final_conv(x)} if last == "res5" else maps


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_timms_at_sizes_timm_accepts(name):
    net = timms(name).double()
    size = net.default_cfg["input_size"][-1]
    ours = TimmBackbone(name, norm="BN").double().eval()
    loaded = ours.load_state_dict(net.state_dict(), strict=False)
    assert (
        not loaded.missing_keys
        and loaded.unexpected_keys
        and all(key.startswith("head.") for key in loaded.unexpected_keys)
    )
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in ours.state_dict().items())

    features = timm.create_model(name, features_only=True).double().eval()
    flat = {re.sub(r"^(stages|stem(?=\.conv\d))\.", r"\1_", key): tensor for key, tensor in net.state_dict().items()}
    assert not features.load_state_dict(flat, strict=False).missing_keys
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = dict(zip(STRIDES, features(x)[1:], strict=True))
        maps = ours(x)
        for feature, wanted in expected.items():
            assert relative(maps[feature], wanted) < 1e-12, feature
            assert (
                ours.output_shape()[feature].channels == wanted.shape[1]
                and ours.output_shape()[feature].stride == STRIDES[feature]
            )
        # attention has a say in it
        for key, parameter in ours.named_parameters():
            if key.endswith("_rel"):
                parameter.zero_()
        assert relative(ours(x)["res5"], expected["res5"]) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_any_size_has_strides_and_gradients(name):
    ours = TimmBackbone(name, norm="BN")
    for height, width in [(70, 103), (33, 32)]:
        maps = ours(torch.randn(2, 3, height, width))
        assert {f: x.shape[-2:] for f, x in maps.items()} == {
            f: (-(-height // s), -(-width // s)) for f, s in STRIDES.items()
        }
    sum(x.square().mean() for x in maps.values()).backward()
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    # Images of a batch do not mix.
    x = torch.randn(2, 3, 33, 32, dtype=torch.float64)
    with torch.no_grad():
        together, alone = ours.double().eval()(x), ours(x[1:])
    for feature, wanted in alone.items():
        assert relative(together[feature][1:], wanted) < 1e-10, feature


@pytest.mark.parametrize(("name", "last"), [("halonet26t", "res4"), ("sehalonet33ts", "res3"), ("halonet50ts", "res3")])
def test_pixels_outside_an_image_are_zeros(name, last):
    """Far enough from its end, an image gives what timm gives for it on a larger black ground.

    Far enough: where timm's maps do not change when the ground is noise. Squeeze-excitation, which looks at the whole
    map, is left out.
    """
    features = list(STRIDES)[: list(STRIDES).index(last) + 1]
    net, ours = timm.create_model(name), TimmBackbone(name, norm="BN", out_features=features).double().eval()
    for model in (net, ours):
        for path, module in list(model.named_modules()):
            if type(module).__name__ == "SEModule":
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, nn.Identity())
    size = net.default_cfg["input_size"][-1]
    net = randomize(net, size).double()
    ours.load_state_dict(net.state_dict(), strict=False)
    height, width = size - 19, 2 * size - 53
    ground = torch.zeros(1, 3, size, 2 * size, dtype=torch.float64)
    ground[..., :height, :width] = torch.randn(height, width)
    noise = torch.randn_like(ground)
    noise[..., :height, :width] = ground[..., :height, :width]
    with torch.no_grad():
        wanted, disturbed = timms_maps(net, ground, last), timms_maps(net, noise, last)
        maps = ours(ground[..., :height, :width])
    for feature in features:
        h, w = maps[feature].shape[-2:]
        a, b, c = maps[feature], wanted[feature][..., :h, :w], disturbed[feature][..., :h, :w]
        inside = ((b - c).abs().amax(1) < 1e-13 * b.abs().max())[0]
        assert inside.float().mean() > 0.2, feature
        assert relative(a[..., inside], b[..., inside]) < 1e-12, feature


def test_other_norms_have_the_same_weights():
    net = timms("halonet26t")
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        wanted = timms_maps(net, x)["res5"]
    for norm, prefix in {"FrozenBN": "Frozen", "SyncBN": "Sync"}.items():
        ours = TimmBackbone("halonet26t", norm=norm).eval()
        assert not ours.load_state_dict(net.state_dict(), strict=False).missing_keys
        kinds = {type(m).__name__ for m in ours.modules() if "BatchNorm" in type(m).__name__}
        assert kinds and all(kind.startswith(prefix) for kind in kinds)
        with torch.no_grad():
            assert relative(ours(x)["res5"], wanted) < 1e-5, norm


def test_frozen_stages_are_not_trained():
    ours = TimmBackbone("halonet26t", norm="BN", freeze_at=3)
    learning = {key.split(".")[0] + "." + key.split(".")[1] for key, p in ours.named_parameters() if p.requires_grad}
    assert learning == {"stages.2", "stages.3"}
    before = {key: t.clone() for key, t in ours.state_dict().items() if "running" in key}
    ours.train()(torch.randn(2, 3, 64, 64))
    moved = {key for key, t in ours.state_dict().items() if "running" in key and not torch.equal(t, before[key])}
    assert moved and all(key.startswith(("stages.2", "stages.3")) for key in moved)


def test_unused_stages_are_not_built():
    ours = TimmBackbone("sehalonet33ts", out_features=["res3", "res4"])
    assert (
        set(ours.output_shape()) == {"res3", "res4"}
        and len(ours.stages) == 3
        and not list(ours.final_conv.parameters())
    )
    assert set(ours(torch.randn(1, 3, 40, 40))) == {"res3", "res4"}


def test_invalid_names_and_values_list_the_valid_ones():
    with pytest.raises(ValueError, match="'halonet5ts'.*halonet50ts"):
        TimmBackbone("halonet5ts")
    with pytest.raises(ValueError, match="'halonet50ts.a2_in1k'.*halonet50ts.a1h_in1k"):
        TimmBackbone("halonet50ts.a2_in1k")
    with pytest.raises(ValueError, match="norm='GN'.*FrozenBN"):
        TimmBackbone("halonet26t", norm="GN")
    with pytest.raises(ValueError, match="stem"):
        TimmBackbone("halonet26t", out_features=["stem"])
    with pytest.raises(ValueError, match="window=-1"):
        TimmBackbone("halo2botnet50ts_256", window=-1)


def test_configs_take_preprocessing_from_timm():
    assert expected_input("haloregnetz_b") == ("RGB", [127.5] * 3, [127.5] * 3)
    backbone = [
        "MODEL.BACKBONE.NAME",
        "build_halodet_timm_fpn_backbone",
        "MODEL.HALODET_TIMM.NAME",
        "haloregnetz_b.ra3_in1k",
    ]
    cfg = load_config("mask_rcnn_halo_h0", backbone)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ("RGB", [127.5] * 3, [127.5] * 3)
    wrong = [*backbone, "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"]
    with torch.device("meta"), pytest.raises(ValueError, match="PIXEL_STD.*58.395.*haloregnetz_b.*127.5"):
        build_backbone(load_config("mask_rcnn_halo_h0", wrong))
    kept = load_config("mask_rcnn_halo_h0", [*wrong, "MODEL.HALODET_TIMM.CHECK_PREPROCESSING", "False"])
    assert kept.INPUT.FORMAT == "BGR" and kept.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
