"""Config files: how they are found and read, and what is rejected."""

import re

from halodet.config import find_config, load_config
from halodet.config.load import _RENAMED_KEYS
from halodet.errors import ConfigError
from halodet.mixers.halo import HaloMixer

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

PLAIN = "VERSION: 2\n"


def write(tmp_path, text, name="config.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def rejected(path, opts=()):
    """The message of the ConfigError that loading gives."""
    with pytest.raises(ConfigError) as error:
        load_config(str(path), opts)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_overrides_of_the_variants_row():
    mixers = "['halo', 'halo', 'halo', 'conv']"
    cfg = load_config("mask_rcnn_halo_h4", ["MODEL.HALONET.BLOCK_SIZE", "8", "MODEL.HALONET.MIXERS", mixers])
    with torch.device("meta"):
        variant = build_backbone(cfg).bottom_up.variant
    assert (variant.block_size, variant.halo_size, variant.bottleneck_ratio) == (8, 2, 3.0)
    assert variant.mixers == ("halo", "halo", "halo", "conv")


def test_the_attention_backend_reaches_the_layers():
    model = build_model(load_config("mask_rcnn_halo_h0", ["MODEL.HALONET.BACKEND", "unfold", "MODEL.DEVICE", "cpu"]))
    mixers = [module for module in model.modules() if isinstance(module, HaloMixer)]
    assert mixers and {mixer.backend for mixer in mixers} == {"unfold"}


def test_a_config_is_found_by_path_and_by_name(tmp_path):
    own = write(tmp_path, "MODEL:\n  HALONET:\n    VARIANT: H0\n")
    assert str(find_config(own)) == own
    assert find_config("mask_rcnn_halo_h4").name == "mask_rcnn_halo_h4.yaml"
    assert find_config("quick/mask_rcnn_halo_shapes.yaml").is_file()
    assert "mask_rcnn_halo_h4.yaml" in rejected("configs/mask_rcnn_hallo_h4.yaml")
    assert "--config-file" in rejected("")


@pytest.mark.parametrize("way", ["file", "base", "list of bases", "override"])
def test_nothing_in_a_config_is_executed(tmp_path, way):
    target = tmp_path / "made-by-the-config"
    path = write(tmp_path, f"MODEL:\n  WEIGHTS: !!python/object/apply:os.mkdir ['{target}']\n", "unsafe.yaml")
    opts = []
    if way in ("base", "list of bases"):
        path = write(tmp_path, f"_BASE_: {'unsafe.yaml' if way == 'base' else '[unsafe.yaml]'}\n")
    elif way == "override":
        path, opts = write(tmp_path, PLAIN), ["SOLVER.MAX_ITER", f"__import__('os').mkdir('{target}')"]
    message = rejected(path, opts)
    assert "os.mkdir" in message if way != "override" else "SOLVER.MAX_ITER" in message
    assert not target.exists()


@pytest.mark.parametrize("below", [False, True], ids=["itself", "its base"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("MODEL: [", "line 1"),
        ("MODEL: &m\n  MODEL: *m\n", "MODEL|recursi"),
        ("SEED: " + "[" * 1000 + "]" * 1000, "recursion"),
        ("SEED: 1\nSEED: 2\n", "SEED in line 2"),
        ("SOLVER:\n  MAX_ITER: 3\nMODEL:\n  MASK_ON: True\nSOLVER:\n  BASE_LR: 0.1\n", "SOLVER in line 5"),
        ("SOLVER:\n\tMAX_ITER: 3\n", r"\\t"),
        ("? [1, 2]\n: 3\n", "unhashable|unexpected|list"),
        ("SEED: 2020-99-99\n", "month"),
        ("- 1\n", "mapping"),
        ("", "mapping"),
        ("_BASE_: odd.yaml\n", "Circular _BASE_: .*odd.yaml -> .*odd.yaml"),
        ("_BASE_: none.yaml\n", "none.yaml, .*_BASE_ of .*odd.yaml"),
        ("_BASE_: .\n", "directory"),
        ("_BASE_: 3\n", "_BASE_=3"),
        ("_BASE_:\n", "_BASE_=None"),
        ("SOLVER:\n  MAX_ITERS: 3\n", "SOLVER.MAX_ITERS .*similar: SOLVER.MAX_ITER,"),
        ("SOLVER: [1]\n", r"SOLVER=\[1\] .*such as SOLVER\.\w+\.$"),
    ],
)
def test_files_that_are_no_config_are_named(tmp_path, text, named, below):
    path = write(tmp_path, text, "odd.yaml")
    if below:
        path = write(tmp_path, "_BASE_: odd.yaml\n")
    message = rejected(path)
    assert re.search(named, message), message
    assert ".yaml" in message or "MAX_ITERS" in message


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin1.yaml"
    path.write_bytes("OUTPUT_DIR: é\n".encode("latin-1"))
    assert "latin1.yaml" in rejected(path)


def test_aliases_and_merged_keys(tmp_path):
    path = write(tmp_path, "MODEL:\n  HALONET: &own\n    NORM: GN\n  HALODET_TIMM:\n    <<: *own\n    NORM: BN\n")
    cfg = load_config(path)
    assert (cfg.MODEL.HALONET.NORM, cfg.MODEL.HALODET_TIMM.NORM) == ("GN", "BN")


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (["MODEL.HALONET.VARIANT"], "1 words"),
        (["SOLVER.MAX_ITER", "9", "--resume"], "--resume"),
        (["MODEL.HALONET.VARIAN", "H1"], "MODEL.HALONET.VARIAN .*MODEL.HALONET.VARIANT"),
        (["MODEL.EMA.ENABELD", "True"], "MODEL.EMA.ENABELD .*MODEL.EMA.ENABLED"),
        (["solver.ims_per_batch", "2"], "SOLVER.IMS_PER_BATCH"),
        (["SOLVER.MAX_ITER.FOO", "5"], "SOLVER.MAX_ITER.FOO"),
        (["SEED.X", "2"], "SEED.X .*SEED"),
        (["SOLVER", "2"], r"SOLVER=2 .*SOLVER\.\w+\.$"),
        (["SOLVER.IMS_PER_BATCH", "16x"], "SOLVER.IMS_PER_BATCH=16x .* int .*16.* str"),
        (["SOLVER.BASE_LR", "0"], "SOLVER.BASE_LR=0 .* float"),
    ],
)
def test_overrides_that_are_rejected(opts, named):
    message = rejected("mask_rcnn_r50", opts)
    assert re.search(named, message), message


def test_an_old_key_names_the_new_one(tmp_path):
    assert "SOLVER.GRAD_ACCUM_STEPS" in rejected("mask_rcnn_r50", ["SOLVER.ACCUMULATE", "2"])
    path = write(tmp_path, "MODEL:\n  HALODET_TIMM:\n    WINDOW: 8\n")
    assert "MODEL.HALODET_TIMM.WINDOW_SIZE" in rejected(path)
    leaves = {key.rpartition(".")[2] for key in re.findall(r"(?:node|cfg)\.([\w.]+) = ", _defaults())}
    assert set(_RENAMED_KEYS.values()) <= leaves and not set(_RENAMED_KEYS) & leaves


def _defaults():
    return (find_config("mask_rcnn_r50").parents[1] / "halodet/config/defaults.py").read_text()
