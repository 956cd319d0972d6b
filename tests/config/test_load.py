"""Configs: found, read without executing anything, and every mistake told in one sentence."""

import os
import sys

from halodet.checkpoint import latest_checkpoint
from halodet.config import load as setup
from halodet.config.load import find_config
from halodet.engine import check_weights, check_writable, load_config
from halodet.errors import CheckpointError, ConfigError
from halodet.mixers.halo import HaloMixer

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

PLAIN = "VERSION: 2\n"
CPU = ["MODEL.DEVICE", "cpu"]
HALO = [
    "MODEL.BACKBONE.NAME",
    "build_halonet_fpn_backbone",
    "MODEL.FPN.IN_FEATURES",
    "['res2', 'res3', 'res4', 'res5']",
]


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_overrides_of_the_variants_row():
    mixers = "['halo', 'halo', 'halo', 'conv']"
    cfg = load_config("mask_rcnn_halo_h4", ["MODEL.HALONET.BLOCK_SIZE", "8", "MODEL.HALONET.MIXERS", mixers])
    with torch.device("meta"):
        variant = build_backbone(cfg).bottom_up.variant
    assert (variant.block_size, variant.halo_size, variant.bottleneck_ratio) == (8, 2, 3.0)
    assert variant.mixers == ("halo", "halo", "halo", "conv")


def test_a_config_is_found_by_path_and_by_name(tmp_path):
    own = write(tmp_path, "MODEL:\n  HALONET:\n    VARIANT: H0\n")
    assert str(find_config(own)) == own
    assert find_config("mask_rcnn_halo_h4").name == "mask_rcnn_halo_h4.yaml"
    assert find_config("quick/mask_rcnn_halo_shapes.yaml").is_file()


def test_a_config_executes_nothing(tmp_path):
    target = tmp_path / "made-by-the-config"
    path = write(tmp_path, f"MODEL:\n  WEIGHTS: !!python/object/apply:os.mkdir ['{target}']\n")
    with pytest.raises(ConfigError, match="not a plain YAML config"):
        load_config(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("MODEL: [", [], "not a plain YAML config"),
        (
            "MODEL:\n  HALONET:\n    BLOK_SIZE: 8\n",
            [],
            "no config key MODEL.HALONET.BLOK_SIZE: the nearest are MODEL.HALONET.BLOCK_SIZE",
        ),
        ("- 1\n- 2\n", [], "holds no config"),
        ("", [], "holds no config"),
        (PLAIN, ["MODEL.HALONET.VARIANT"], "pairs KEY VALUE, got 1 words"),
        (PLAIN, ["SOLVER.MAX_ITER", "9", "--resume"], "--resume stands among the overrides .*: flags come before them"),
        (PLAIN, ["MODEL.HALONET.VARIAN", "H1"], "nearest are MODEL.HALONET.VARIANT"),
        (PLAIN, [*HALO, "MODEL.HALONET.VARIANT", "H9"], "no HaloNet variant 'H9'"),
        (
            PLAIN,
            ["MODEL.BACKBONE.NAME", "build_halo_backbone"],
            "no backbone 'build_halo_backbone': the nearest are build_halonet_backbone",
        ),
        (PLAIN, ["SOLVER.OPTIMIZER", "Adam"], "SOLVER.OPTIMIZER is 'Adam'"),
        (PLAIN, ["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "schedule under SOLVER cannot be used: Unknown LR scheduler"),
        (PLAIN, ["SOLVER.MAX_ITER.FOO", "5"], "override not usable"),
        (
            PLAIN,
            [*CPU, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "fp16"],
            "SOLVER.AMP.PRECISION fp16 needs a GPU",
        ),
        (PLAIN, ["SOLVER.AMP.PRECISION", "float16"], "SOLVER.AMP.PRECISION is 'float16'"),
        (PLAIN, ["SOLVER.GRAD_ACCUM_STEPS", "0"], "SOLVER.GRAD_ACCUM_STEPS is 0, expected 1 or more"),
        (PLAIN, ["SOLVER.NON_FINITE_POLICY", "ignore"], "SOLVER.NON_FINITE_POLICY is 'ignore'"),
        (PLAIN, ["SOLVER.NON_FINITE_MAX_STEPS", "-1"], "SOLVER.NON_FINITE_MAX_STEPS is -1"),
        (
            PLAIN,
            [*HALO, "MODEL.HALONET.USE_ACT_CHECKPOINT", "['res6']"],
            "use_act_checkpoint is .'res6'., expected a list",
        ),
        (PLAIN, ["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'"),
        (PLAIN, [*HALO, "MODEL.HALONET.MIXERS", "halo"], "mixers is 'halo', expected 4 entries"),
        (PLAIN, [*HALO, "MODEL.HALONET.NUM_HEADS", "8"], "num_heads is 8, expected 4 entries"),
        (PLAIN, [*HALO, "MODEL.HALONET.NUM_HEADS", "(4, 8, 8, 0)"], "0 heads do not divide"),
        (PLAIN, [*HALO, "MODEL.HALONET.BASE_WIDTH", "wide"], "cannot be built"),
        (PLAIN, [*HALO, "MODEL.HALONET.NORM", "BNN"], "norm is 'BNN', expected one of"),
        (PLAIN, [*HALO, "MODEL.HALONET.BORDER", "reflect"], "border 'reflect'"),
        (PLAIN, [*HALO, "MODEL.HALONET.BLOCK_SIZE", "0"], "block_size"),
        (PLAIN, [*HALO, "MODEL.HALONET.DROP_PATH_RATE", "1.5"], "drop_path_rate is 1.5"),
        (PLAIN, HALO, "asks for 'res4', which is not there"),
        (PLAIN, [*HALO, "MODEL.META_ARCHITECTURE", "Foo"], "No object named 'Foo'"),
        (PLAIN, ["SOLVER.MAX_ITER", "many"], "override not usable"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, text, opts, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, text), opts)
    assert "\n" not in str(error.value)


def test_rotated_boxes_need_compiled_operators(tmp_path, monkeypatch):
    monkeypatch.delattr("detectron2._C", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2._C", None)  # importing it fails, also where it is installed
    with pytest.raises(ConfigError, match="RROIHeads"):
        load_config(write(tmp_path, PLAIN), ["MODEL.ROI_HEADS.NAME", "RROIHeads"])


def test_bf16_needs_no_gpu():
    assert load_config("mask_rcnn_halo_h0", [*CPU, "SOLVER.AMP.ENABLED", "True"]).SOLVER.AMP.PRECISION == "bf16"


def test_compilation_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="MODEL.COMPILE needs a C"):
        load_config("mask_rcnn_halo_h0", [*CPU, "MODEL.COMPILE", "True"])


def test_a_missing_config_names_the_nearest():
    with pytest.raises(ConfigError, match="mask_rcnn_halo_h4.yaml"):
        load_config("configs/mask_rcnn_hallo_h4.yaml")
    with pytest.raises(ConfigError, match="--config-file"):
        load_config("")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_uses_the_cpu(caplog):
    assert load_config("mask_rcnn_halo_h0").MODEL.DEVICE == "cpu"
    assert "running on the CPU" in caplog.text


def test_the_attention_backend_reaches_the_layers(monkeypatch):
    model = build_model(load_config("mask_rcnn_halo_h0", ["MODEL.HALONET.BACKEND", "unfold", "MODEL.DEVICE", "cpu"]))
    mixers = [module for module in model.modules() if isinstance(module, HaloMixer)]
    assert mixers and {mixer.backend for mixer in mixers} == {"unfold"}
    with pytest.raises(ConfigError, match="attention backend is 'flash'"):
        load_config("mask_rcnn_halo_h0", ["MODEL.HALONET.BACKEND", "flash"])
    monkeypatch.setattr(setup, "triton_unavailable_reason", lambda device: f"there is no Triton for {device}")
    with pytest.raises(ConfigError, match="BACKEND is triton, but there is no Triton for cpu: set it to auto"):
        load_config("mask_rcnn_halo_h0", ["MODEL.HALONET.BACKEND", "triton", "MODEL.DEVICE", "cpu"])


def test_weights_are_checked_before_anything_long_starts(tmp_path):
    cfg = load_config("mask_rcnn_halo_h0", ["OUTPUT_DIR", str(tmp_path)])
    assert check_weights(cfg, eval_only=False, resume=False) == ""
    with pytest.raises(ConfigError, match="--eval-only needs trained weights: add MODEL.WEIGHTS"):
        check_weights(cfg, eval_only=True, resume=False)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        check_weights(cfg, eval_only=True, resume=True)
    cfg = load_config("mask_rcnn_halo_h0", ["MODEL.WEIGHTS", str(tmp_path / "gone.pth")])
    with pytest.raises(ConfigError, match="gone.pth, which is not a file"):
        check_weights(cfg, eval_only=False, resume=False)
    (tmp_path / "gone.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="gone.pth"):
        check_weights(cfg, eval_only=False, resume=False)
    cfg = load_config("mask_rcnn_halo_h0", ["MODEL.WEIGHTS", "nowhere://halonet"])
    with pytest.raises((ConfigError, CheckpointError), match="nowhere://halonet"):
        check_weights(cfg, eval_only=False, resume=False)


def test_weights_are_matched_with_the_model_before_anything_long_starts(tmp_path):
    cfg = load_config("quick/mask_rcnn_halo_small", ["OUTPUT_DIR", str(tmp_path)])
    state = build_model(cfg).state_dict()
    heads = {name: value for name, value in state.items() if name.startswith(("proposal_generator", "roi_heads"))}
    torch.save({"model": heads}, tmp_path / "heads.pth")
    cfg = load_config("quick/mask_rcnn_halo_small", ["MODEL.WEIGHTS", str(tmp_path / "heads.pth")])
    with pytest.raises(
        CheckpointError, match="heads.pth does not fit the config.*MODEL.WEIGHTS_MIN_LOADED asks for 95.0 %.*backbone"
    ):
        check_weights(cfg, eval_only=False, resume=False)
    cfg = load_config(
        "quick/mask_rcnn_halo_small", ["MODEL.WEIGHTS", str(tmp_path / "heads.pth"), "MODEL.WEIGHTS_MIN_LOADED", "0.1"]
    )
    assert check_weights(cfg, eval_only=False, resume=False) == str(tmp_path / "heads.pth")
    with pytest.raises(CheckpointError, match="use the config it was trained with"):
        check_weights(cfg, eval_only=True, resume=False)
    with pytest.raises(ConfigError, match="WEIGHTS_MIN_LOADED is 95.0, expected a share"):
        load_config("quick/mask_rcnn_halo_small", ["MODEL.WEIGHTS_MIN_LOADED", "95.0"])
    torch.save({"model": {"other": torch.zeros(3)}}, tmp_path / "other.pth")
    cfg = load_config(
        "quick/mask_rcnn_halo_small", ["MODEL.WEIGHTS", str(tmp_path / "other.pth"), "MODEL.WEIGHTS_MIN_LOADED", "0.0"]
    )
    with pytest.raises(CheckpointError, match="no tensor of the file has a name of the model's"):
        check_weights(cfg, eval_only=False, resume=False)


def run_checkpoint(folder, state, iteration, started=0.0, name=None):
    trainer = {"iteration": iteration, "hooks": {"RunState": {"started": started}}, "_trainer": {"optimizer": {}}}
    path = folder / (name or f"model_{iteration:07d}.pth")
    torch.save({"model": state, "trainer": trainer, "iteration": iteration}, path)
    return str(path)


def test_resume_starts_from_the_newest_checkpoint_that_can_be_read(tmp_path, caplog):
    cfg = load_config("quick/mask_rcnn_halo_small", ["OUTPUT_DIR", str(tmp_path)])
    tag = tmp_path / "last_checkpoint"
    tag.write_text("model_0000009.pth")
    with pytest.raises(
        CheckpointError, match="names model_0000009.pth, and no checkpoint is there.*begin anew without --resume"
    ):
        check_weights(cfg, eval_only=False, resume=True)
    state = build_model(cfg).state_dict()
    torch.save({"model": state, "iteration": 9}, tmp_path / "model_0000009.pth")
    with pytest.raises(
        CheckpointError, match="model_0000009.pth holds weights, but not the iteration and the optimizer"
    ):
        check_weights(cfg, eval_only=False, resume=True)
    run_checkpoint(tmp_path, state, 9)
    newest = run_checkpoint(tmp_path, state, 10)
    assert check_weights(cfg, eval_only=True, resume=True) == newest
    assert "names 'model_0000009.pth', but the newest checkpoint is model_0000010.pth" in caplog.text
    state.popitem()
    run_checkpoint(tmp_path, state, 9)
    run_checkpoint(tmp_path, state, 10)
    with pytest.raises(CheckpointError, match="1 of the model's"):
        check_weights(cfg, eval_only=False, resume=True)


@pytest.mark.parametrize(
    "tag", [None, "", "\0\0\0", "model_0000030.pth", "model_0000020.pth", "gone.pth", "model_final.pth"]
)
def test_broken_checkpoints_are_named_and_passed_over(tmp_path, caplog, tag):
    if tag is not None:
        (tmp_path / "last_checkpoint").write_text(tag)
    state = {"w": torch.arange(1000.0)}
    for iteration in (9, 20, 30):
        good = run_checkpoint(tmp_path, state, iteration)
    run_checkpoint(tmp_path, state, 15, name="model_final.pth")  # of a run that has been made longer since
    torch.save({"model": state}, tmp_path / "model_0000099.pth")
    with open(good, "r+b") as file:
        file.truncate(2000)
    assert os.path.basename(latest_checkpoint(tmp_path).path) == "model_0000020.pth"
    assert (
        "model_0000030.pth is truncated or damaged" in caplog.text and "Going on from model_0000020.pth" in caplog.text
    )
    assert "model_0000099.pth holds weights, but not" in caplog.text
    (tmp_path / "model_0000020.pth").write_bytes(b"")
    assert os.path.basename(latest_checkpoint(tmp_path).path) == "model_final.pth"


def test_of_two_runs_in_a_folder_the_later_one_counts(tmp_path):
    state = {"w": torch.ones(1)}
    run_checkpoint(tmp_path, state, 900, started=1000.0)
    for iteration in (9, 19):
        run_checkpoint(tmp_path, state, iteration, started=2000.0)
    for tag in ("model_0000019.pth", "model_0000009.pth", "gone.pth"):
        (tmp_path / "last_checkpoint").write_text(tag)
        assert os.path.basename(latest_checkpoint(tmp_path).path) == "model_0000019.pth"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_output_folder_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_writable(os.path.join(tmp_path, "file", "output"))
    check_writable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
