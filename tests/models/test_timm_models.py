"""HaloNets as timm models: names, timm's interface and training with timm's own functions."""

import argparse
import copy

from halodet.checkpoint import read_checkpoint, write_weights
from halodet.models import VARIANTS, HaloNet

import pytest
import torch

timm = pytest.importorskip("timm", reason="timm is not installed")
timm_models = pytest.importorskip("halodet.models.timm_models")

from timm.optim import create_optimizer_v2, param_groups_layer_decay  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3  # noqa: E402

# As timm's --model-kwargs gives them.
TINY = {
    "base_width": 8,
    "stem_channels": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 2, 2],
    "block_size": 4,
    "halo_size": 1,
}


def tiny(**options):
    return timm.create_model("halodet_halonet_h3", **(TINY | options))


def randomize(model):
    """Set weights and statistics with which every tensor affects the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
    return model


def test_every_variant_is_registered_in_its_detection_form():
    assert sorted(timm.list_models("halodet_*")) == sorted(timm_models.TIMM_MODELS)
    assert sorted(timm_models.TIMM_MODELS.values()) == sorted(VARIANTS)
    assert {"halodet_halonet_h0", "halodet_halonet_h7", "halodet_r50_se", "halodet_r101_se_halo_b32h3"} <= set(
        timm_models.TIMM_MODELS
    )
    assert not timm.list_pretrained("halodet_*")
    for name, variant in timm_models.TIMM_MODELS.items():
        with torch.device("meta"):
            model, ours = timm.create_model(name), HaloNet(variant, num_classes=1000)
        assert model.variant == VARIANTS[variant]
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
        assert model.get_classifier() is model.get_submodule(model.default_cfg["classifier"])
        assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 3


def test_logits_equal_those_of_halonet_at_any_size():
    theirs = randomize(tiny(num_classes=5, in_chans=4)).eval()
    ours = HaloNet(theirs.variant, in_channels=4, num_classes=5, out_features=["res5", "linear"]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for size in ((64, 64), (51, 83)):
        x = torch.rand(2, 4, *size)
        with torch.no_grad():
            maps, features = ours(x), theirs.forward_features(x)
            assert torch.equal(theirs(x), maps["linear"]) and maps["linear"].std() > 0
            assert torch.equal(features, maps["res5"]) and features.shape[1] == theirs.num_features
            pooled = theirs.forward_head(features, pre_logits=True)
            assert pooled.shape == (2, theirs.head_hidden_size)
            assert torch.equal(theirs.get_classifier()(pooled), maps["linear"])


def test_arguments_of_timms_training_script():
    model = timm.create_model(
        "halodet_r50_se_halo_b8h3", pretrained=False, in_chans=1, num_classes=10, drop_rate=0.3, drop_path_rate=0.2,
        drop_block_rate=None,
        global_pool=None, bn_momentum=0.3, bn_eps=1e-3, scriptable=False, checkpoint_path="", mixers=["conv", "conv",
        "conv", "conv"],
        base_width=8, num_heads=(1, 1, 1, 1), se_ratio=0.25,
    )  # fmt: skip
    assert model.variant.mixers == ("conv",) * 4 and model.variant.se_ratio == 0.25 and model.num_classes == 10
    assert model.stem.conv1.conv.in_channels == 1 and model.drop_rate == 0.3
    assert model.res5[-1].drop_path.p == 0.2 and model.res2[0].drop_path.p == 0
    assert {(m.momentum, m.eps) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {(0.3, 1e-3)}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"global_pool": "token"}, "global_pool"),
        ({"drop_block_rate": 0.1}, "drop_block_rate"),
        ({"depth": 3}, "depth=3"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"mixers": ["halo"]}, "mixers"),
    ],
)
def test_invalid_arguments_are_named(options, key):
    with pytest.raises(ValueError, match=key):
        tiny(**options)


def test_dropout_is_active_in_training_only():
    model = tiny(drop_rate=0.5, num_classes=3).train()
    features = torch.rand(1, model.num_features, 2, 2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    assert torch.equal(model.forward_head(features, pre_logits=True), model.forward_head(features, pre_logits=True))
    assert torch.equal(model.eval().forward_head(features), model.forward_head(features))


def test_reset_classifier():
    model = tiny(num_classes=0).eval()
    x = torch.rand(1, 3, 64, 64)
    assert model(x).shape == (1, model.head_hidden_size) and model.num_classes == 0
    assert not any(name.startswith("head.linear") for name in model.state_dict())
    model.reset_classifier(7)
    assert model(x).shape == (1, 7) and model.num_classes == 7
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(7, "token")
    features = model.forward_features(x)
    model.reset_classifier(0, "max")
    assert torch.equal(model(x), model.head.final(features).amax((-2, -1)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.head.final(features))


def test_features_only_gives_the_maps_of_halonet():
    whole = randomize(tiny()).eval()
    ours = HaloNet(whole.variant).eval()
    ours.load_state_dict(whole.state_dict(), strict=False)
    model = tiny(features_only=True, out_indices=(1, -1)).eval()
    assert (model.feature_info.reduction(), model.feature_info.channels()) == (
        [8, 32],
        [whole.feature_channels[name] for name in ("res3", "res5")],
    )
    assert not model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    x = torch.rand(1, 3, 51, 83)
    with torch.no_grad():
        maps = ours(x)
        for actual, name in zip(model(x), ("res3", "res5"), strict=True):
            assert actual.std() > 0
            torch.testing.assert_close(actual, maps[name])  # timm's wrapper keeps the images' memory format


def test_intermediates_are_the_maps_of_halonet():
    model = randomize(tiny()).eval()
    ours = HaloNet(model.variant).eval()
    ours.load_state_dict(model.state_dict(), strict=False)
    x = torch.rand(1, 3, 51, 83)
    with torch.no_grad():
        maps = list(ours(x).values())
        last, intermediates = model.forward_intermediates(x)
        assert torch.equal(last, maps[3]) and all(map(torch.equal, intermediates, maps))
        (third,) = model.forward_intermediates(x, [2], stop_early=True, intermediates_only=True)
        assert torch.equal(third, maps[2])
        with pytest.raises(ValueError, match="output_fmt='NHWC'"):
            model.forward_intermediates(x, output_fmt="NHWC")
        assert model.prune_intermediate_layers([1, 2]) == [1, 2]
        assert not any(name.startswith(("res5", "head")) for name in model.state_dict())
        assert torch.equal(model(x), maps[2])


def test_grad_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model, x = tiny(num_classes=3).double().train(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    torch.nn.init.ones_(model.res5[0].conv3.norm.weight)
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    for network in (model, again):
        network(x).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_parameter_groups_of_timm():
    model = tiny()
    decays = {}
    for group in param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    ):
        decays |= {id(parameter): (group["weight_decay"], group["lr_scale"]) for parameter in group["params"]}
    decays = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    tables = [name for name in decays if "pos_embed" in name]
    assert tables and all(decays[name][0] == 0 for name in tables)
    assert decays["res4.0.mixer.q.weight"][0] == 0.05 and decays["res4.0.conv1.norm.weight"][0] == 0
    # stem, 1 + 1 + 2 + 1 blocks, final 1x1 and the last layer: each has half the learning rate of the next
    order = [
        "stem.conv1.conv",
        "res2.0.conv1.conv",
        "res3.0.conv1.conv",
        "res4.0.conv1.conv",
        "res4.1.conv1.conv",
        "res5.0.conv1.conv",
    ]
    scales = [decays[f"{name}.weight"][1] for name in order]
    assert [b / a for a, b in zip(scales, scales[1:], strict=False)] == [2] * 5
    assert decays["head.linear.weight"][1] == 1 > scales[-1]


def test_loads_halodet_weights_strictly(tmp_path):
    ours = randomize(HaloNet(tiny().variant, num_classes=1000))
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        write_weights(path, ours.state_dict())
        loaded = tiny(checkpoint_path=str(path)).state_dict()
        assert loaded.keys() == ours.state_dict().keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.state_dict().items())


def test_training_with_timms_functions(tmp_path):
    torch.manual_seed(0)
    args = argparse.Namespace(
        model="halodet_halonet_h3", opt="adamw", lr=3e-3, epochs=4, model_kwargs=TINY, input_size=None
    )
    model = tiny(num_classes=2)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=1, warmup_lr=1e-4
    )
    average = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=average, checkpoint_dir=str(tmp_path), max_history=1)
    # two classes: stripes along one axis or the other
    stripes = (torch.arange(32) // 4 % 2).float().expand(3, 32, 32)
    images = torch.stack([stripes, stripes.transpose(1, 2)] * 4) + 0.1 * torch.randn(8, 3, 32, 32)
    labels = torch.tensor([0, 1] * 4)
    losses = []
    for epoch in range(args.epochs):
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
            loss.backward()
            optimizer.step()
            average.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    assert losses[-1] < 0.5 * losses[0]

    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert checkpoint["args"] == args and checkpoint["epoch"] == epochs - 1
    averaged, last = average.module.state_dict(), model.state_dict()
    assert checkpoint["model"].keys() == last.keys()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in checkpoint["model"].items())
    assert all(torch.equal(tensor, last[name]) for name, tensor in checkpoint["state_dict"].items())
    assert not torch.equal(last["head.linear.weight"], averaged["head.linear.weight"])


def test_scripted_model_gives_the_same_logits():
    model = randomize(tiny(num_classes=5)).eval()
    scripted = torch.jit.script(model)
    for size in ((64, 64), (33, 97)):
        x = torch.rand(2, 3, *size)
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)
