"""Every config file loads, builds, and its backbone gives the feature maps that its heads use."""

from halodet.config.defaults import config_dir
from halodet.solver import build_optimizer

import pytest
import torch
import yaml
from detectron2.modeling import build_backbone, build_model
from helpers import cached_config

NAMES = sorted(
    str(path.relative_to(config_dir())) for path in config_dir().rglob("*.yaml") if not path.name.startswith("Base")
)


def test_documented_configs_exist():
    documented = {
        "mask_rcnn_halo_h4",
        "cascade_mask_rcnn_halo_h4",
        "faster_rcnn_halo_h4",
        "retinanet_halo_h4",
        "mask_rcnn_halo_h4_3x",
        "mask_rcnn_halo_h4_lsj_100ep",
    }
    documented |= {f"mask_rcnn_halo_h{i}" for i in range(8)} | {
        f"mask_rcnn_r{d}{kind}" for d in (50, 101) for kind in ("", "_se")
    }
    documented |= {f"mask_rcnn_r{d}_se_halo_{bh}" for d in (50, 101) for bh in ("b8h3", "b32h3")}
    assert {f"{name}.yaml" for name in documented} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_backbone_gives_the_feature_maps_of_the_heads(name):
    cfg = cached_config(name)
    with torch.device("meta"), torch.no_grad():
        backbone = build_backbone(cfg).eval()
        # detectors pad images to a multiple of size_divisibility; then p5 is odd in height and even in width
        height, width = (-(-s // backbone.size_divisibility) * backbone.size_divisibility for s in (333, 1333))
        maps = backbone(torch.empty(2, 3, height, width))
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    strides = {f"p{level}": 2**level for level in (range(3, 8) if retina else range(2, 7))}
    assert {n: s.stride for n, s in backbone.output_shape().items()} == strides
    for n, x in maps.items():
        assert x.shape == (2, cfg.MODEL.FPN.OUT_CHANNELS, -(-height // strides[n]), -(-width // strides[n]))
    heads = (
        cfg.MODEL.RETINANET.IN_FEATURES if retina else [*cfg.MODEL.RPN.IN_FEATURES, *cfg.MODEL.ROI_HEADS.IN_FEATURES]
    )
    assert set(heads) <= set(maps)
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(strides)


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_plain_yaml_and_short(name):
    text = (config_dir() / name).read_text(encoding="utf-8")
    yaml.safe_load(text)
    assert "_BASE_" in text and len(text.splitlines()) < 80


@pytest.mark.parametrize("name", [n for n in NAMES if "/" not in n])
def test_configs_default_to_coco_and_their_own_output(name):
    cfg = cached_config(name)
    head = name.partition("_")[0]
    kinds = {"panoptic": ("", "_panoptic_separated"), "semantic": ("", "_panoptic_stuffonly")}
    kinds["keypoint"] = ("keypoints_", "")
    before, after = kinds.get(head, ("", ""))
    assert cfg.DATASETS.TRAIN == (f"{before}coco_2017_train{after}",)
    assert cfg.DATASETS.TEST == (f"{before}coco_2017_val{after}",)
    assert cfg.OUTPUT_DIR == f"./output/{name.removesuffix('.yaml')}"


@pytest.mark.parametrize(
    ("name", "decay"), [("mask_rcnn_halonet50ts", 0.05), ("mask_rcnn_halo_h4", 0.0001), ("retinanet_halo_h4", 0.0001)]
)
def test_weight_decay_applies_to_matrices_and_kernels_only(name, decay):
    cfg = cached_config(name)
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    decays = {
        id(p): group["weight_decay"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        excluded = parameter.ndim == 1 or name.endswith(("height_rel", "width_rel"))
        assert decays[id(parameter)] == (0.0 if excluded else decay), name


@pytest.mark.parametrize(
    ("name", "epochs"), [("mask_rcnn_halo_h4", 12), ("mask_rcnn_halo_h4_3x", 36), ("mask_rcnn_halo_h4_lsj_100ep", 100)]
)
def test_schedules_have_the_number_of_epochs_in_their_name(name, epochs):
    solver = cached_config(name).SOLVER
    assert solver.MAX_ITER * solver.IMS_PER_BATCH / 118_287 == pytest.approx(epochs, rel=0.02)
    assert solver.STEPS[-1] < solver.MAX_ITER
