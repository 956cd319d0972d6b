"""Learning rate and weight decay of every parameter of real models."""

import logging
import re

from halodet.config.load import load_config
from halodet.errors import ConfigError
from halodet.mixers import Mixer
from halodet.solver import build_optimizer
from halodet.solver.build import build_lr_scheduler

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler as detectron2_build_lr_scheduler
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from helpers import cached_config
from torch import nn

TINY = [
    "MODEL.HALONET.DEPTHS", "(1, 2, 2, 1)", "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "SOLVER.BASE_LR", "0.01",
    "SOLVER.WEIGHT_DECAY", "0.05",
]  # fmt: skip
HALO = ("mask_rcnn_halo_h0", ["stem", "res2.0", "res3.0", "res3.1", "res4.0", "res4.1", "res5.0"])
RESNET = (
    "mask_rcnn_r50",
    ["stem", *(f"res{s}.{b}" for s, n in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True) for b in range(n))],
)


def build(config, *opts):
    """Return the config, the model on the meta device and its optimizer."""
    cfg = cached_config(config)
    cfg.defrost()
    cfg.merge_from_list([*TINY, *opts, "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    return cfg, model, build_optimizer(cfg, model)


def groups(model, optimizer):
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(by_id), "a parameter is in two groups"
    pairs = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert len(set(pairs)) == len(pairs), "two groups have the same options"
    return {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id}


def below(given, prefix):
    found = [group for name, group in given.items() if name.startswith(prefix + ".")]
    assert found, prefix
    return found


@pytest.mark.parametrize(("config", "layers"), [HALO, RESNET], ids=["HaloNet", "ResNet"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_lr_decays_from_the_last_block_to_the_stem(name, config, layers):
    keys = ("SOLVER.OPTIMIZER_NAME", name, "SOLVER.BACKBONE_LR_MULTIPLIER", "0.5", "SOLVER.LR_LAYER_DECAY", "0.8")
    _, model, optimizer = build(config, *keys)
    given = groups(model, optimizer)
    assert len(given) == len(list(model.parameters()))
    rate = 0.01 * 0.5
    for layer in reversed(layers):
        rate *= 0.8
        (found,) = {group["lr"] for group in below(given, f"backbone.bottom_up.{layer}")}
        assert found == pytest.approx(rate), layer
    for parameter, group in given.items():
        if not parameter.startswith("backbone.bottom_up."):
            assert group["lr"] == 0.01, parameter


def test_lr_without_an_fpn():
    keys = (
        "MODEL.BACKBONE.NAME",
        "build_halonet_backbone",
        "MODEL.RPN.IN_FEATURES",
        "['res4']",
        "MODEL.ROI_HEADS.IN_FEATURES",
        "['res4']",
    )
    keys += ("MODEL.ANCHOR_GENERATOR.SIZES", "[[64]]", "MODEL.HALONET.OUT_FEATURES", "['res4']")
    _, model, optimizer = build("mask_rcnn_halo_h0", *keys, "SOLVER.LR_LAYER_DECAY", "0.5")
    given = groups(model, optimizer)
    blocks = HALO[1][: HALO[1].index("res5.0")]
    assert [below(given, f"backbone.{layer}")[0]["lr"] for layer in blocks] == [
        0.01 / 2**d for d in range(len(blocks), 0, -1)
    ]
    assert {group["lr"] for name, group in given.items() if not name.startswith("backbone.")} == {0.01}


def test_backbone_multiplier_alone():
    _, model, optimizer = build("mask_rcnn_halo_h0", "SOLVER.BACKBONE_LR_MULTIPLIER", "0.1")
    for name, group in groups(model, optimizer).items():
        assert group["lr"] == pytest.approx(0.001 if name.startswith("backbone.bottom_up.") else 0.01), name


def test_layers_equal_timms():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        network = timm.create_model("halonet26t")
        network.final_conv = nn.Conv2d(4, 4, 1)  # halonet26t has none, others of the family do
        model = nn.Module()
        model.backbone = nn.Module()
        model.backbone.bottom_up, model.heads = network, nn.Linear(4, 4)
    cfg = cached_config("mask_rcnn_halo_h0")
    cfg.defrost()
    cfg.merge_from_list(["SOLVER.LR_LAYER_DECAY", "0.7", "SOLVER.BASE_LR", "1.0"])
    given = groups(model, build_optimizer(cfg, model))
    timms = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(network, layer_decay=0.7)
        for p in group["params"]
    }
    compared = [name for name, _ in network.named_parameters() if not name.startswith("head.")]
    assert len({given[f"backbone.bottom_up.{name}"]["lr"] for name in compared}) > 4
    for name in compared:
        assert given[f"backbone.bottom_up.{name}"]["lr"] == pytest.approx(timms[id(network.get_parameter(name))]), name
    assert given["heads.weight"]["lr"] == 1


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("decay", ["0.0", "0.02"])
def test_weight_decay_of_tables_norms_and_biases(name, decay):
    keys = (
        "SOLVER.OPTIMIZER_NAME",
        name,
        "SOLVER.WEIGHT_DECAY_NORM",
        "0.001",
        "SOLVER.WEIGHT_DECAY_BIAS",
        "0.002",
        "SOLVER.WEIGHT_DECAY_REL_POS",
        decay,
        "SOLVER.LR_LAYER_DECAY",
        "0.9",
    )
    _, model, optimizer = build("mask_rcnn_halo_h0", *keys)
    given, tables = groups(model, optimizer), 0
    for module_name, module in model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            table = parameter in ("height_rel", "width_rel")
            tables += table
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            # as in Detectron2, the bias of a norm is a bias
            expected = float(decay) if table else 0.002 if parameter == "bias" else 0.001 if norm else 0.05
            assert given[f"{module_name}.{parameter}"]["weight_decay"] == expected, (module_name, parameter)
    assert tables == 2 * 3  # three halo blocks


def test_sgd_equals_detectron2s_by_default():
    def plain(optimizer, but=()):
        skipped = {id(p) for p in but}
        kept = [
            ({k: v for k, v in g.items() if k != "params"}, [id(p) for p in g["params"]])
            for g in optimizer.param_groups
        ]
        return [(options, [i for i in ids if i not in skipped]) for options, ids in kept if set(ids) - skipped]

    momentum = (
        "SOLVER.MOMENTUM",
        "0.8",
        "SOLVER.NESTEROV",
        "True",
        "SOLVER.BIAS_LR_FACTOR",
        "2.0",
        "SOLVER.WEIGHT_DECAY_BIAS",
        "0.0",
    )
    cfg, model, sgd = build("mask_rcnn_r50", *momentum)
    theirs = detectron2_build_optimizer(cfg, model)
    assert type(sgd) is type(theirs) and sgd.defaults == theirs.defaults
    assert plain(sgd) == plain(theirs)
    cfg, model, sgd = build("mask_rcnn_halo_h0", *momentum)
    tables = [p for name, p in model.named_parameters() if name.endswith("_rel")]
    assert plain(sgd, but=tables) == plain(detectron2_build_optimizer(cfg, model), but=tables)


def test_bias_factor_and_backbone_multiplier_multiply():
    _, model, optimizer = build(
        "mask_rcnn_r50_se", "SOLVER.BIAS_LR_FACTOR", "2.0", "SOLVER.BACKBONE_LR_MULTIPLIER", "0.1"
    )
    given = groups(model, optimizer)
    assert given["backbone.bottom_up.res2.0.se.fc1.bias"]["lr"] == pytest.approx(0.002)
    assert given["backbone.bottom_up.res2.0.se.fc1.weight"]["lr"] == pytest.approx(0.001)
    assert given["backbone.fpn_lateral2.weight"]["lr"] == 0.01


def test_frozen_layers_have_no_group_but_count_as_layers():
    keys = ("SOLVER.LR_LAYER_DECAY", "0.5")
    whole = groups(*build("mask_rcnn_halo_h0", *keys)[1:])
    frozen = groups(*build("mask_rcnn_halo_h0", *keys, "MODEL.BACKBONE.FREEZE_AT", "2")[1:])
    assert not [name for name in frozen if name.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2"))]
    assert {name: group["lr"] for name, group in frozen.items()} == {name: whole[name]["lr"] for name in frozen}


def test_schedule_keeps_the_ratios():
    cfg, _, optimizer = build(
        "mask_rcnn_halo_h0", "SOLVER.LR_LAYER_DECAY", "0.5", "SOLVER.MAX_ITER", "10", "SOLVER.STEPS", "(5,)"
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    build_lr_scheduler(cfg, optimizer)
    warm = [group["lr"] for group in optimizer.param_groups]
    assert [w / warm[0] for w in warm] == pytest.approx([r / rates[0] for r in rates]) and warm[0] < rates[0]


def test_mixers_declare_parameters_without_weight_decay():
    class Toy(Mixer):
        def __init__(self):
            super().__init__()
            self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.ones(4))

        def no_weight_decay(self):
            return {"norm.weight", "scale"}

    model = nn.ModuleDict({"mixer": Toy(), "other": nn.Linear(4, 4)})
    cfg = cached_config("mask_rcnn_halo_h0")
    cfg.defrost()
    cfg.merge_from_list(
        ["SOLVER.WEIGHT_DECAY", "0.05", "SOLVER.WEIGHT_DECAY_NORM", "0.05", "SOLVER.WEIGHT_DECAY_BIAS", "0.05"]
    )
    decays = {name: group["weight_decay"] for name, group in groups(model, build_optimizer(cfg, model)).items()}
    assert decays == {
        "mixer.scale": 0.0, "mixer.norm.weight": 0.0, "mixer.norm.bias": 0.05, "other.weight": 0.05, "other.bias": 0.05,
    }  # fmt: skip


def test_groups_are_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="halodet")
    _, model, _ = build("mask_rcnn_halo_h0", "SOLVER.LR_LAYER_DECAY", "0.5", "SOLVER.WEIGHT_DECAY_NORM", "0.0")
    (record,) = [r.getMessage() for r in caplog.records if "Parameter groups" in r.getMessage()]
    rows = [re.split(r" {2,}", line.strip()) for line in record.splitlines()[3:]]
    assert sum(int(row[3].replace(",", "")) for row in rows) == sum(p.numel() for p in model.parameters())
    stem = [row for row in rows if row[4] == "stem"]
    assert [(row[0], row[1]) for row in stem] == [(f"{0.01 / 2**7:.4g}", "0.05"), (f"{0.01 / 2**7:.4g}", "0")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.BACKBONE_LR_MULTIPLIER", "0.0"),
        ("SOLVER.BACKBONE_LR_MULTIPLIER", "-1.0"),
        ("SOLVER.BACKBONE_LR_MULTIPLIER", "1e999"),
        ("SOLVER.LR_LAYER_DECAY", "0.0"),
        ("SOLVER.LR_LAYER_DECAY", "1.1"),
        ("SOLVER.WEIGHT_DECAY_REL_POS", "-0.1"),
    ],
)
def test_invalid_values_are_named(key, value):
    with pytest.raises(ConfigError, match=key):
        load_config("mask_rcnn_halo_h0", [key, value])


def test_layer_decay_needs_known_layers(other_backbone):
    with pytest.raises(ValueError, match="LR_LAYER_DECAY.*stem, s1, s2, s3, s4"):
        build("mask_rcnn_halo_h0", "SOLVER.LR_LAYER_DECAY", "0.8", "MODEL.BACKBONE.NAME", other_backbone)


def test_other_backbones_take_the_multiplier(other_backbone):
    _, model, optimizer = build(
        "mask_rcnn_halo_h0", "MODEL.BACKBONE.NAME", other_backbone, "SOLVER.BACKBONE_LR_MULTIPLIER", "0.5"
    )
    assert {group["lr"] for group in below(groups(model, optimizer), "backbone.bottom_up")} == {0.005}


def test_multiplier_needs_a_backbone():
    cfg = cached_config("mask_rcnn_halo_h0")
    cfg.defrost()
    cfg.SOLVER.BACKBONE_LR_MULTIPLIER = 0.5
    with pytest.raises(ValueError, match="BACKBONE_LR_MULTIPLIER=0.5"):
        build_optimizer(cfg, nn.Linear(2, 2))


@pytest.fixture
def other_backbone(monkeypatch):
    """Register Detectron2's RegNet, whose layers have other names."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import BACKBONE_REGISTRY, FPN
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.regnet import AnyNet, ResBottleneckBlock, SimpleStem

    def build_a_regnet(cfg, input_shape: ShapeSpec):
        maps = ["s1", "s2", "s3", "s4"]
        network = AnyNet(
            stem_class=SimpleStem, stem_width=8, block_class=ResBottleneckBlock, depths=[1] * 4, widths=[8] * 4,
            group_widths=[8] * 4,
            strides=[2] * 4, bottleneck_ratios=[1] * 4, se_ratio=0, activation_class=nn.ReLU, norm="BN",
            out_features=maps,
        )  # fmt: skip
        return FPN(network, maps, 16, top_block=LastLevelMaxPool())

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_a_regnet", build_a_regnet)
    return "build_a_regnet"


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
def test_a_schedule_is_defined_to_the_end_of_training(name, rescale):
    opts = ["SOLVER.MAX_ITER", 8, "SOLVER.STEPS", "(4,)", "SOLVER.WARMUP_ITERS", 2, "SOLVER.RESCALE_INTERVAL", rescale]
    cfg = cached_config("mask_rcnn_r50", "MODEL.DEVICE", "cpu", "SOLVER.LR_SCHEDULER_NAME", name, *opts)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    theirs = detectron2_build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    for _ in range(7):
        optimizer.step()
        scheduler.step()
        theirs.step()
        assert scheduler.get_last_lr() == theirs.get_last_lr()
    last = scheduler.get_last_lr()
    scheduler.step()  # after the last iteration
    if name == "WarmupStepWithFixedGammaLR":
        assert scheduler.get_last_lr() == last
