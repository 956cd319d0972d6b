"""Start of a run: the weights it starts from, the model on the device meta, and that each is done once."""

import os

from halodet.config import load_config
from halodet.engine import main, startup
from halodet.engine.startup import build_meta_model, check_weights, choose_seed
from halodet.errors import CheckpointError, ConfigError
from halodet.utils.io import check_writable

import pytest
import torch
from detectron2.modeling import build_model

SMALL = "quick/mask_rcnn_halo_small"
CPU = ["MODEL.DEVICE", "cpu"]
RPN = ["MODEL.RPN.IN_FEATURES", "['p4']"]
HALO = [
    "MODEL.BACKBONE.NAME",
    "build_halonet_fpn_backbone",
    "MODEL.FPN.IN_FEATURES",
    "['res2', 'res3', 'res4', 'res5']",
]


@pytest.fixture(scope="module")
def model():
    return build_meta_model(load_config(SMALL))


@pytest.fixture(scope="module")
def state():
    return build_model(load_config(SMALL, CPU)).state_dict()


def small(folder, weights=None, *opts):
    return load_config(SMALL, ["OUTPUT_DIR", str(folder), *(["MODEL.WEIGHTS", str(weights)] if weights else []), *opts])


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (["MODEL.BACKBONE.NAME", "build_halo_backbone"], "build_halo_backbone"),
        ([*HALO, "MODEL.HALONET.VARIANT", "H9"], "H9"),
        ([*HALO, "MODEL.HALONET.USE_ACT_CHECKPOINT", "['res6']"], "res6"),
        ([*HALO, "MODEL.HALONET.MIXERS", "halo"], "'halo'"),
        ([*HALO, "MODEL.HALONET.NUM_HEADS", "(4, 8, 8, 3)"], "^MODEL.HALONET.NUM_HEADS=3 is invalid"),
        ([*HALO, "MODEL.HALONET.NORM", "BNN"], "BNN"),
        ([*HALO, "MODEL.HALONET.BORDER", "reflect"], "reflect"),
        ([*HALO, "MODEL.HALONET.VARIANT", "R50"], "^MODEL.HALONET.VARIANT='R50' is invalid"),
        ([*HALO, "MODEL.HALONET.MIXERS", "('conv', 'conv', ('halo', 'halo'), 'halo')"], "^MODEL.HALONET.MIXERS="),
        ([*HALO, "MODEL.HALONET.BACKEND", "flash"], "flash"),
        (HALO, "'res4'"),
        ([*HALO, "MODEL.META_ARCHITECTURE", "Foo"], "^MODEL.META_ARCHITECTURE='Foo' is invalid"),
        ([*HALO, "MODEL.FPN.IN_FEATURES", "['res2', 'res4']"], "log2 contiguous. Fix: check the keys of MODEL.FPN"),
        ([*HALO, "MODEL.RPN.IN_FEATURES", "['p9']"], "KeyError 'p9'. Fix: check the keys of MODEL.RPN"),
        ([*HALO, *RPN, "MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3']"], "assert len.*MODEL.ROI_HEADS"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet", "TEST.AUG.ENABLED", "True"], "TEST.AUG|build"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_error(tmp_path, opts, named):
    path = tmp_path / "config.yaml"
    path.write_text("VERSION: 2\n")
    cfg = load_config(str(path), [*CPU, *opts])
    with pytest.raises(ConfigError, match=named) as error:
        build_meta_model(cfg)
    assert "\n" not in str(error.value)


def test_weights_must_exist(tmp_path, model):
    cfg = small(tmp_path)
    assert not check_weights(cfg, model)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS"):
        check_weights(cfg, model, eval_only=True)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS"):
        check_weights(cfg, model, eval_only=True, resume=True)
    with pytest.raises((ConfigError, CheckpointError), match="gone.pth"):
        check_weights(small(tmp_path, tmp_path / "gone.pth"), model)
    (tmp_path / "gone.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="gone.pth"):
        check_weights(small(tmp_path, tmp_path / "gone.pth"), model)
    with pytest.raises((ConfigError, CheckpointError), match="nowhere://halonet"):
        check_weights(small(tmp_path, "nowhere://halonet"), model)


def test_weights_must_fit_the_model(tmp_path, model, state):
    heads = {name: value for name, value in state.items() if name.startswith(("proposal_generator", "roi_heads"))}
    torch.save({"model": heads}, tmp_path / "heads.pth")
    with pytest.raises(CheckpointError, match="heads.pth.*MODEL.WEIGHTS_MIN_LOADED"):
        check_weights(small(tmp_path, tmp_path / "heads.pth"), model)
    cfg = small(tmp_path, tmp_path / "heads.pth", "MODEL.WEIGHTS_MIN_LOADED", "0.1")
    assert check_weights(cfg, model)
    with pytest.raises(CheckpointError, match="heads.pth"):
        check_weights(cfg, model, eval_only=True)
    torch.save({"model": {"other": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth"):
        check_weights(small(tmp_path, tmp_path / "other.pth", "MODEL.WEIGHTS_MIN_LOADED", "0.0"), model)


def save(folder, state, iteration):
    trainer = {"iteration": iteration, "hooks": {}, "_trainer": {"optimizer": {}}}
    torch.save({"model": state, "trainer": trainer, "iteration": iteration}, folder / f"model_{iteration:07d}.pth")


def test_resume_starts_from_the_latest_readable_checkpoint(tmp_path, model, state):
    cfg = small(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(CheckpointError, match="model_0000009.pth"):
        check_weights(cfg, model, resume=True)
    save(tmp_path, state, 9)
    save(tmp_path, state, 10)
    assert check_weights(cfg, model, eval_only=True, resume=True).path == str(tmp_path / "model_0000010.pth")
    other = dict(state)
    other.popitem()
    save(tmp_path, other, 10)
    with pytest.raises(CheckpointError, match="model_0000010.pth"):
        check_weights(cfg, model, resume=True)


def test_checkpoints_of_another_run_are_named(tmp_path, model, state, caplog):
    assert check_weights(small(tmp_path), model) is None and "another run" not in caplog.text
    save(tmp_path, state, 9)
    check_weights(small(tmp_path), model)
    assert "model_0000009.pth" in caplog.text and "--resume" in caplog.text


def test_a_second_dataset_replaces_the_first_and_says_so(capsys):
    for flag in ("--train-json", "--train-images", "--val-json", "--val-images"):
        args = main.argument_parser("").parse_args([flag, "a", flag, "a", flag, "b"])
        assert getattr(args, flag[2:].replace("-", "_")) == "b"
        assert capsys.readouterr().err.count(f"{flag} b replaces a") == 1


def test_an_override_with_an_equals_sign_is_named(tmp_path):
    for word in ("SOLVER.BASE_LR=0.1", "MODEL.RESNETS.RES2_OUT_CHANNELS=64"):
        with pytest.raises(ConfigError, match=f"Fix: {word.replace('=', ' ')}"):
            load_config("quick/mask_rcnn_halo_shapes", [word])


def test_output_dir_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="OUTPUT_DIR"):
        check_writable(os.path.join(tmp_path, "file", "output"))
    check_writable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


def test_the_seed_is_that_of_the_resumed_run():
    assert choose_seed({"trainer": {"hooks": {"ResumeState": {"seed": 7}}}}) == 7
    assert choose_seed(None) != choose_seed(None) and choose_seed({"trainer": {}}) >= 0


def test_a_run_does_its_work_once(tmp_path, train_net, monkeypatch):
    """Resuming reads its one checkpoint once, loads its config once and builds one model beside that on meta."""
    assert train_net(tmp_path, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 9, "DATALOADER.NUM_WORKERS", 0) == 0
    calls = []

    def counted(function, name):
        def call(*arguments, **options):
            calls.append(name)
            return function(*arguments, **options)

        return call

    for module, name in (
        (main, "load_config"),
        (startup, "build_model"),
        ("halodet.checkpoint.latest", "read_checkpoint"),
        ("halodet.checkpoint.io", "read_checkpoint"),
        ("halodet.checkpoint.checkpointer", "read_checkpoint"),
        ("detectron2.engine.defaults", "build_model"),
    ):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.{name}", counted(_attribute(target, name), name))
    assert train_net(tmp_path, "SOLVER.MAX_ITER", 2, flags=["--resume"]) == 0
    assert sorted(calls) == ["build_model", "build_model", "load_config", "read_checkpoint"]


def _attribute(module, name):
    import importlib

    return getattr(importlib.import_module(module), name)
