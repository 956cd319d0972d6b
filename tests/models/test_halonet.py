"""HaloNet against published parameter counts and timm: sizes, norms, drop path and invalid arguments."""

import dataclasses
import re

from halodet.models import STAGES, VARIANTS, HaloNet

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

PARAMETERS = {"H0": 5.50, "H1": 8.10, "H2": 9.41, "H3": 11.84, "H4": 19.10, "H5": 30.72, "H6": 43.46, "H7": 67.43}
ALL_ATTENTION = {"mixers": ("halo",) * 4}
# small in width and depth, but with every kind of block: conv, strided and unstrided attention, mixed stages
SMALL = dataclasses.replace(
    VARIANTS["H0"],
    depths=(1, 2, 2, 2),
    mixers=("conv", ("conv", "halo"), "halo", "halo"),
    base_width=16,
    stem_channels=16,
    num_heads=(2,) * 4,
)


def count(model):
    return sum(p.numel() for p in model.parameters())


def randomize(model, seed=0):
    """Non-trivial norms: a fresh network's zero gammas would hide whatever its branches do.

    The gammas are below one, as deep attention with random weights turns rounding errors into chaos where its logits
    are large.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 0.6, generator=generator)
            module.bias.data.uniform_(-0.2, 0.2, generator=generator)
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_classifier_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = HaloNet(dataclasses.replace(VARIANTS[name], **ALL_ATTENTION), num_classes=1000, out_features=["linear"])
    assert count(model) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.05)


@pytest.mark.parametrize(("name", "parameters"), [("R50-SE", 28_088_024), ("R101-SE", 49_326_872)])
def test_se_baselines_are_se_resnets(name, parameters):
    with torch.device("meta"):
        assert count(HaloNet(name, num_classes=1000, out_features=["linear"])) == parameters


def test_h1_equals_timm_with_its_weights():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = randomize(timm.create_model("halonet_h1")).eval()
    variant = dataclasses.replace(VARIANTS["H1"], **ALL_ATTENTION, num_heads=(8,) * 4, border="zero")
    ours = HaloNet(variant, num_classes=1000, out_features=["res2", "res5", "linear"]).eval()
    assert count(ours) == count(theirs) == 8_100_056

    names = {
        "stem.conv1.bn.": "stem.conv1.norm.", "stages.0.": "res2.", "stages.1.": "res3.", "stages.2.": "res4.",
        "stages.3.": "res5.",
        "conv1_1x1.bn.": "conv1.norm.", "conv1_1x1.": "conv1.", "conv3_1x1.bn.": "conv3.norm.", "conv3_1x1.": "conv3.",
        "self_attn.": "mixer.", "post_attn.": "norm2.", "shortcut.bn.": "shortcut.norm.", "head.fc.": "head.linear.",
    }  # fmt: skip
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict(state, strict=True)

    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
            features = theirs.to(dtype).forward_features(x.to(dtype))
            logits = theirs.forward_head(features)
            maps = ours.to(dtype)(x.to(dtype))
            assert features.std() > 0.1 and logits.std() > 0.01
            torch.testing.assert_close(maps["linear"], logits, rtol=0, atol=tolerance)
            assert (maps["res5"] - features).abs().max() <= tolerance * features.abs().max()


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("size", [(64, 64), (97, 131), (33, 200), (9, 5)])
def test_any_size(size, border):
    model = randomize(HaloNet(dataclasses.replace(SMALL, border=border), out_features=["stem", *STAGES])).eval()
    images = torch.randn(2, 3, *size)
    maps = model(images)
    strides, channels = model.feature_strides, model.feature_channels
    assert list(maps) == ["stem", *STAGES] and [strides[name] for name in maps] == [4, 4, 8, 16, 32]
    for name, x in maps.items():
        # every layer that halves rounds up, so the last map is the input over its stride, rounded up
        assert x.shape == (2, channels[name], *(-(-s // strides[name]) for s in size))
        assert torch.isfinite(x).all() and x.std() > 0
    # Images of a batch do not mix.
    one = model(images[1:])
    for name, x in maps.items():
        torch.testing.assert_close(x[1:], one[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_at_a_size_no_block_divides(name):
    mixers = tuple(m if isinstance(m, str) else m[:2] for m in VARIANTS[name].mixers)
    model = randomize(HaloNet(dataclasses.replace(VARIANTS[name], depths=(1, 1, 2, 2), mixers=mixers))).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 70, 101))
    assert all(torch.isfinite(x).all() and x.std() > 0 for x in maps.values())
    assert [x.shape[-2:] for x in maps.values()] == [(18, 26), (9, 13), (5, 7), (3, 4)]
    width, ratio = VARIANTS[name].base_width, VARIANTS[name].bottleneck_ratio
    assert [x.shape[1] for x in maps.values()] == [width * ratio * 2**s for s in range(4)]


def test_padding_of_a_batch_reaches_no_further_than_the_windows():
    """Zeros on the right, as for a wider image in the same batch, do not change features far from them."""
    variant = dataclasses.replace(
        SMALL, depths=(1, 1, 1, 1), mixers=("conv", "conv", "halo", "halo"), block_size=2, halo_size=1
    )
    model = randomize(HaloNet(variant)).double().eval()
    image = torch.randn(1, 3, 64, 512, dtype=torch.float64)
    padded = torch.nn.functional.pad(image, (0, 256))
    with torch.no_grad():
        alone, together = model(image), model(padded)
    for name, stride in (("res4", 16), ("res5", 32)):
        columns = 256 // stride
        assert torch.equal(alone[name][..., :columns], together[name][..., :columns])
        assert not torch.equal(alone[name], together[name][..., : alone[name].shape[-1]])


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", "GN"])
@pytest.mark.parametrize("name", ["H2", "R50-SE-halo-b8h3"])
def test_norms_train(norm, name):
    variant = dataclasses.replace(VARIANTS[name], depths=(1, 1, 1, 1))
    model = HaloNet(variant, norm=norm)
    kinds = {
        type(m)
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm | nn.GroupNorm | FrozenBatchNorm2d)
    }
    assert kinds == {
        {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "SyncBN": nn.SyncBatchNorm, "GN": nn.GroupNorm}[norm]
    }
    sum(x.square().mean() for x in model(torch.randn(2, 3, 64, 96)).values()).backward()
    assert model.stem.conv1.conv.weight.grad.abs().sum() > 0


def test_branches_start_at_zero_unless_the_norm_is_frozen():
    x = torch.randn(1, 3, 64, 64)
    assert (HaloNet(SMALL).res3[1].conv3.norm.weight == 0).all()
    assert (HaloNet(SMALL, norm="FrozenBN").res3[1].conv3.norm.weight == 1).all()
    block = HaloNet(SMALL).eval().res3[1]
    features = torch.relu(torch.randn(1, block.conv1.conv.in_channels, 8, 8))
    torch.testing.assert_close(block(features), features)
    assert HaloNet(SMALL)(x)["res5"].abs().sum() > 0


def test_stochastic_depth_drops_branches_only_while_training():
    model = randomize(HaloNet(SMALL, drop_path_rate=0.5))
    rates = [block.drop_path.p for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.5 * i / 6 for i in range(7)])
    x = torch.randn(2, 3, 64, 64)
    model.eval()
    assert torch.equal(model(x)["res5"], model(x)["res5"])
    block = model.res5[1].train()
    kept = block.drop_path(torch.ones(4000, 1, 1, 1))
    assert set(kept.unique().tolist()) == {0.0, 2.0} and kept.mean().item() == pytest.approx(1.0, abs=0.1)
    block.drop_path.p = 1.0
    features = torch.relu(torch.randn(2, block.conv1.conv.in_channels, 4, 4))
    torch.testing.assert_close(block(features), features)


def test_only_what_is_asked_for_is_built():
    model = HaloNet(SMALL, out_features=["res3"])
    assert list(model.feature_channels) == ["stem", "res2", "res3"] and not hasattr(model, "res4")
    assert list(model(torch.randn(1, 3, 32, 32))) == ["res3"]


@pytest.mark.parametrize(
    ("changes", "options", "key"),
    [
        ({"mixers": ("conv",) * 3}, {}, "mixers"),
        ({"mixers": ("conv", "conv", "halo", ("halo",) * 5)}, {}, "expected 2 names for res5"),
        ({"mixers": ("conv", "conv", "lambad", "halo")}, {}, "'lambad'"),
        ({"depths": (1, 0, 1, 1)}, {}, "res3"),
        ({"bottleneck_ratio": 0.3}, {}, "bottleneck_ratio=0.3"),
        ({"num_heads": (2, 2, 3, 2)}, {}, "num_heads=3"),
        ({"activation": "tanh"}, {}, "activation='tanh'"),
        ({"border": "reflect"}, {}, "border='reflect'"),
        ({"halo_size": -1}, {}, "halo_size=-1"),
        ({"se_ratio": -1.0}, {}, "se_ratio=-1.0"),
        ({}, {"backend": "cuda"}, "backend='cuda'"),
        ({}, {"norm": "BNN"}, "norm='BNN'"),
        ({}, {"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
        ({}, {"out_features": ["res6"]}, "res6"),
        ({}, {"out_features": []}, "out_features"),
        ({}, {"mixer_options": {"lambad": {}}}, "lambad"),
        ({}, {"mixer_options": {"conv": {"groups": 2}}}, "groups=2"),
    ],
)
def test_invalid_arguments_are_named(changes, options, key):
    with pytest.raises(ValueError, match=re.escape(key)):
        HaloNet(dataclasses.replace(SMALL, **changes), **options)


def test_unknown_variant_lists_the_variants():
    with pytest.raises(ValueError, match="'H8'.*H7"):
        HaloNet("H8")


def test_mixer_options_reach_their_mixer_only():
    variant = dataclasses.replace(SMALL, mixers=("conv", "conv", "halo", ("botnet", "halo")))
    model = HaloNet(variant, mixer_options={"botnet": {"window": 3, "table_size": [5, 6]}})
    assert model.res5[0].mixer.window == 3 and model.res5[0].mixer.pos_embed.width_rel.shape[0] == 11
    assert model(torch.randn(1, 3, 64, 96))["res5"].shape[-2:] == (2, 3)


def test_norm_may_be_a_factory():
    model = HaloNet(SMALL, norm=lambda channels: nn.GroupNorm(1, channels))
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {1}


def test_feature_extraction_and_symbolic_traces_take_any_size():
    model = randomize(HaloNet(SMALL)).eval()
    extractor = create_feature_extractor(model, {"res3": "a", "res5.0.mixer": "b"})
    traced = torch.fx.symbolic_trace(model)
    for size in ((64, 64), (97, 131)):
        x = torch.randn(1, 3, *size)
        maps, inner = model(x), {}
        hook = model.res5[0].mixer.register_forward_hook(lambda _, __, out, inner=inner: inner.update(out=out))
        model(x)
        hook.remove()
        found = extractor(x)
        assert torch.equal(found["a"], maps["res3"]) and torch.equal(found["b"], inner["out"])
        assert all(torch.equal(value, maps[name]) for name, value in traced(x).items())


@pytest.mark.parametrize("options", [{}, {"border": "zero", "block_size": 3, "se_ratio": 0.25}])
@pytest.mark.parametrize("features", [["res5", "stem", "linear"], ["res3"]])
def test_scripted_networks_take_any_size(features, options):
    classes = 5 if "linear" in features else None
    model = HaloNet(dataclasses.replace(SMALL, **options), out_features=features, num_classes=classes)
    randomize(model).eval()
    scripted = torch.jit.script(model)
    for size in ((64, 64), (33, 97)):
        x = torch.randn(1, 3, *size)
        maps, found = model(x), scripted(x)
        assert list(found) == features
        for name, value in maps.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [8, 16])
def test_dilation_is_torchvisions(stride):
    # A ResNet-50 with the stride in its 3x3 convolutions, as torchvision's.
    variant = dataclasses.replace(
        VARIANTS["R50-SE"], mixers=("conv",) * 4, se_ratio=0.0, activation="relu", base_width=64, stem_channels=64
    )
    replace = [False, stride == 8, True]
    theirs = randomize(torchvision.models.resnet50(replace_stride_with_dilation=replace)).eval()
    ours = HaloNet(variant, output_stride=stride).eval()
    names = {
        "stem.conv1.conv": "conv1", "stem.conv1.norm": "bn1", "conv1.conv": "conv1", "conv1.norm": "bn1",
        "mixer.conv": "conv2", "norm2": "bn2", "conv3.conv": "conv3", "conv3.norm": "bn3",
        "shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1",
    }  # fmt: skip
    state = theirs.state_dict()

    def renamed(key):
        stage, _, rest = key.partition(".")
        prefix = f"layer{int(stage[3:]) - 1}." if stage.startswith("res") else ""
        block, rest = rest.split(".", 1) if prefix else ("", key)
        module, _, leaf = rest.rpartition(".")
        return f"{prefix}{block}{'.' if block else ''}{names[module]}.{leaf}"

    ours.load_state_dict({key: state[renamed(key)] for key in ours.state_dict()})
    extractor = create_feature_extractor(theirs, {f"layer{i}": f"res{i + 1}" for i in range(1, 5)})
    x = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        maps, expected = ours(x), extractor(x)
    assert ours.feature_strides["res5"] == stride and [m.shape for m in maps.values()][-1][2] == -(-97 // stride)
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [8, 16])
def test_attention_keeps_its_resolution_at_a_smaller_output_stride(stride):
    model = randomize(HaloNet(SMALL, output_stride=stride)).eval()
    assert list(model.feature_strides.values()) == [4, *(min(s, stride) for s in (4, 8, 16, 32))]
    maps = model(torch.randn(1, 3, 97, 131))
    assert [value.shape[2] for value in maps.values()] == [-(-97 // min(s, stride)) for s in (4, 8, 16, 32)]
    assert model.state_dict().keys() == HaloNet(SMALL).state_dict().keys()
    with pytest.raises(ValueError, match="output_stride=4"):
        HaloNet(SMALL, output_stride=4)


def test_external_attention_at_the_end_of_a_stage():
    variant = dataclasses.replace(SMALL, external_slots=(0, 0, 0, 5))
    model, plain = randomize(HaloNet(variant)).eval(), HaloNet(SMALL).eval()
    end = SMALL.depths[3]
    extra = {key for key in model.state_dict() if key.startswith(f"res5.{end}.")}
    assert set(model.state_dict()) - set(plain.state_dict()) == extra and extra
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key not in extra})
    x = torch.randn(2, 3, 70, 101)
    with torch.no_grad():
        ours, theirs = model(x), plain(x)
        assert torch.equal(ours["res4"], theirs["res4"])
        expected = model.res5[end].attention(theirs["res5"]).relu()
    torch.testing.assert_close(ours["res5"], expected)
    assert not torch.equal(ours["res5"], theirs["res5"])
    with pytest.raises(ValueError, match="external_slots"):
        HaloNet(dataclasses.replace(SMALL, external_slots=(0, 0)))
    with pytest.raises(ValueError, match=r"external_slots=1\.5"):
        HaloNet(dataclasses.replace(SMALL, external_slots=(0, 0, 0, 1.5)))
