"""halodet's config keys and registry names beside those of other projects, in any order."""

import itertools

from halodet.config import add_halodet_config, load_config
from halodet.config.projects import import_projects
from halodet.errors import ConfigError

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
from helpers import ROOT, run_code


def add_mask2former_like_config(cfg):
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.MODEL.MASK_FORMER = CfgNode({"DEC_LAYERS": 6})
    cfg.INPUT.COLOR_AUG_SSD = False


def add_detic_like_config(cfg):
    cfg.MODEL.TIMM = CfgNode({"BASE_NAME": "resnet50", "OUT_LEVELS": (3, 4, 5), "NORM": "FrozenBN"})
    cfg.SOLVER.USE_CUSTOM_SOLVER = False


@pytest.mark.parametrize(
    "order", list(itertools.permutations([add_halodet_config, add_mask2former_like_config, add_detic_like_config]))
)
def test_keys_of_other_projects_keep_their_values(order):
    cfg = get_cfg()
    for add_config in order:
        add_config(cfg)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.MODEL.MASK_FORMER.DEC_LAYERS) == ("ADAMW", 0.1, 6)
    assert dict(cfg.MODEL.TIMM) == {"BASE_NAME": "resnet50", "OUT_LEVELS": (3, 4, 5), "NORM": "FrozenBN"}
    assert (cfg.SOLVER.OPTIMIZER_NAME, cfg.SOLVER.BACKBONE_LR_MULTIPLIER) == ("SGD", 1.0)
    assert cfg.MODEL.HALONET.VARIANT == "H4" and cfg.SOLVER.AMP.PRECISION == "bf16"


def test_a_second_call_keeps_the_values():
    cfg = get_cfg()
    add_halodet_config(cfg)
    cfg.MODEL.HALONET.VARIANT, cfg.SOLVER.AMP.PRECISION = "H1", "fp16"
    add_halodet_config(cfg)
    assert (cfg.MODEL.HALONET.VARIANT, cfg.SOLVER.AMP.PRECISION) == ("H1", "fp16")


@pytest.mark.parametrize(
    ("key", "value"), [("INPUT.COPY_PASTE", False), ("MODEL.EMA.DECAY", "slow"), ("WANDB", "project")]
)
def test_a_key_of_another_type_is_an_error(key, value):
    def add_other_config(cfg):
        *nodes, last = key.split(".")
        for name in nodes:
            if name not in cfg:
                setattr(cfg, name, CfgNode())
            cfg = cfg[name]
        setattr(cfg, last, value)

    cfg = get_cfg()
    add_other_config(cfg)
    with pytest.raises(ConfigError, match=f"^{key}={value!r} "):
        add_halodet_config(cfg)


def test_keys_of_projects_can_be_set_by_files_and_overrides(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("MODEL: {MASK_FORMER: {DEC_LAYERS: 3}}\n")
    projects = [add_mask2former_like_config]
    cfg = load_config(str(path), ["SOLVER.OPTIMIZER", "ADAM"], add_configs=projects)
    assert (cfg.MODEL.MASK_FORMER.DEC_LAYERS, cfg.SOLVER.OPTIMIZER, cfg.SOLVER.OPTIMIZER_NAME) == (3, "ADAM", "SGD")
    with pytest.raises(ConfigError, match="MODEL.MASK_FORMER"):
        load_config(str(path))


@pytest.mark.parametrize("key", ["DATALOADER.SAMPLER_TRAIN", "SOLVER.LR_SCHEDULER_NAME"])
def test_values_that_a_project_knows_are_allowed_with_its_function(key):
    cfg = load_config("mask_rcnn_halo_h0", [key, "OfAProject"], add_configs=[lambda cfg: None])
    assert "OfAProject" in (cfg.DATALOADER.SAMPLER_TRAIN, cfg.SOLVER.LR_SCHEDULER_NAME)
    with pytest.raises(ConfigError, match=f"{key}=OfAProject"):
        load_config("mask_rcnn_halo_h0", [key, "OfAProject"])


def test_python_tags_need_a_flag(tmp_path):
    path = tmp_path / "anchors.yaml"
    sizes = '!!python/object/apply:eval ["[[x, x * 2] for x in [32, 64]]"]'
    path.write_text(f"MODEL: {{ANCHOR_GENERATOR: {{SIZES: {sizes}}}}}\n")
    with pytest.raises(ConfigError, match="anchors.yaml.*--allow-unsafe-config"):
        load_config(str(path))
    assert load_config(str(path), allow_unsafe=True).MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64], [64, 128]]


def test_a_package_gives_its_config_functions():
    assert [f.__name__ for f in import_projects(["halodet.config", "detectron2.config"])] == []
    with pytest.raises(ConfigError, match="--import no_such_module .*ModuleNotFoundError"):
        import_projects(["no_such_module"])


TAKEN = """
import logging, sys
logging.basicConfig()
from detectron2.modeling import BACKBONE_REGISTRY
@BACKBONE_REGISTRY.register()
def build_halonet_backbone(cfg, input_shape): ...
import halodet
assert BACKBONE_REGISTRY.get("build_halonet_backbone") is build_halonet_backbone
for name in [name for name in sys.modules if name.partition(".")[0] == "halodet"]:
    del sys.modules[name]
import halodet
assert halodet.load_config("mask_rcnn_halo_h4").MODEL.HALONET.VARIANT == "H4"
"""


def test_taken_names_and_a_second_import(tmp_path):
    assert "build_timm_backbone" not in BACKBONE_REGISTRY, "Detic's name"
    run = run_code(TAKEN, tmp_path, ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("MODEL.BACKBONE.NAME=build_halonet_backbone") == 2 and "__main__" in run.stderr
