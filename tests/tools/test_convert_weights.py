"""tools/convert_weights.py: files there and back, what it prints, and how it refuses."""

import dataclasses
import pickle
from pathlib import Path

from halodet.checkpoint import Checkpointer, read_checkpoint
from halodet.models import VARIANTS, HaloNet

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import assert_same_tensors, cached_config, load_tool

tool = load_tool("convert_weights")
SMALL = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.HALONET.DEPTHS",
    "(1, 1, 1, 1)",
    "MODEL.HALONET.BASE_WIDTH",
    "16",
    "MODEL.HALONET.NUM_HEADS",
    "(1, 1, 2, 2)",
    "MODEL.HALONET.NORM",
    "BN",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "16",
]
KWARGS = {"depths": (1, 1, 1, 1), "base_width": 16, "num_heads": (1, 1, 2, 2), "num_classes": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A detector's checkpoint as training writes it."""
    model = build_model(cached_config("mask_rcnn_halo_h3", *SMALL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 3)
    folder = tmp_path_factory.mktemp("trained")
    optimizer = torch.optim.AdamW(model.parameters())
    DetectionCheckpointer(model, str(folder), optimizer=optimizer).save("model_final", iteration=7)
    return folder / "model_final.pth"


def run(*arguments):
    return tool.main([str(argument) for argument in arguments])


def assert_same_file(one, other):
    assert_same_tensors(read_checkpoint(one)["model"], read_checkpoint(other)["model"])


def test_round_trips_are_bit_equal(trained, tmp_path, capsys):
    # detector -> timm -> the same detector, whose backbone was something else in between
    assert run("--input", trained, "--output", tmp_path / "timm.safetensors", "--to", "timm") == 0
    shown = capsys.readouterr().out
    held = read_checkpoint(trained)["model"]
    assert "--pretrained-path" in shown
    elsewhere = [name for name in held if not name.startswith("backbone.bottom_up.")]
    assert f"left out, without a place in form timm: {len(elsewhere)}" in shown
    assert all(f"\n  {name} (" in shown for name in elsewhere)
    other = {n: torch.zeros_like(t) if n.startswith("backbone.bottom_up.") else t for n, t in held.items()}
    torch.save({"model": other, "iteration": 3}, tmp_path / "other.pth")
    arguments = ["--input", tmp_path / "timm.safetensors", "--output", tmp_path / "back.pth", "--to", "detector"]
    assert run(*arguments, "--into", tmp_path / "other.pth") == 0
    assert f"replaced: {len(held) - len(elsewhere)}; as in" in capsys.readouterr().out
    assert_same_file(tmp_path / "back.pth", trained)
    # and over safetensors
    assert run("--input", trained, "--output", tmp_path / "a.safetensors", "--to", "detector") == 0
    assert run("--input", tmp_path / "a.safetensors", "--output", tmp_path / "a.pth", "--to", "detector") == 0
    assert_same_file(tmp_path / "a.pth", trained)
    # what came out is what Detectron2 loads
    model = build_model(cached_config("mask_rcnn_halo_h3", *SMALL))
    DetectionCheckpointer(model).load(str(tmp_path / "back.pth"))
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())


def test_a_network_that_timm_trained_goes_into_the_detector_and_back(trained, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("halodet.models.timm_models")
    made = timm.create_model("halodet_halonet_h3", **KWARGS)
    torch.save({"state_dict": made.state_dict(), "epoch": 1}, tmp_path / "last.pth.tar")
    assert run("--input", tmp_path / "last.pth.tar", "--output", tmp_path / "detector.pth", "--to", "detector") == 0
    model = build_model(cached_config("mask_rcnn_halo_h3", *SMALL))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    DetectionCheckpointer(model).load(str(tmp_path / "detector.pth"))
    for name, tensor in model.state_dict().items():
        inside = name.removeprefix("backbone.bottom_up.")
        assert torch.equal(tensor, before[name] if inside == name else made.state_dict()[inside])
    # classifier -> timm strictly -> classifier
    assert (
        run("--input", tmp_path / "last.pth.tar", "--output", tmp_path / "classifier.safetensors", "--to", "classifier")
        == 0
    )
    loaded = timm.create_model("halodet_halonet_h3", checkpoint_path=str(tmp_path / "classifier.safetensors"), **KWARGS)
    torch.save(loaded.state_dict(), tmp_path / "again.pth")
    assert_same_file(tmp_path / "again.pth", tmp_path / "classifier.safetensors")
    # a detector's backbone as the start of a classifier: timm's --pretrained-path
    assert run("--input", trained, "--output", tmp_path / "timm.safetensors", "--to", "timm") == 0
    start = {"file": str(tmp_path / "timm.safetensors"), "num_classes": -1}
    begun = timm.create_model(
        "halodet_halonet_h3", pretrained=True, pretrained_cfg_overlay=start, **KWARGS
    ).state_dict()
    held = read_checkpoint(trained)["model"]
    assert all(torch.equal(t, held[f"backbone.bottom_up.{n}"]) for n, t in begun.items() if not n.startswith("head."))


@pytest.mark.parametrize("kind", ["output", "into"])
def test_what_is_read_is_not_overwritten(trained, tmp_path, capsys, kind):
    copy = tmp_path / "a.pth"
    copy.write_bytes(trained.read_bytes())
    (tmp_path / "link.pth").symlink_to(copy)
    into = ["--into", copy] if kind == "into" else []
    source = trained if kind == "into" else copy
    assert run("--input", source, "--output", tmp_path / "link.pth", "--to", "detector", *into) == 2
    assert "--output" in capsys.readouterr().err
    assert copy.read_bytes() == trained.read_bytes()


def test_refusals_are_one_sentence_and_write_nothing(trained, tmp_path, capsys):
    class Bad:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "bad.pkl").write_bytes(
        pickle.dumps({"model": {"stem.w": np.ones(1, np.float32), "res2.w": np.ones(1)}, "x": Bad()})
    )
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"conv1_w": np.ones(1, np.float32)}))
    (tmp_path / "cut.pth").write_bytes(trained.read_bytes()[:5000])
    output = tmp_path / "out.pth"
    for source, more, reason in (
        (tmp_path / "none.pth", [], "none.pth"),
        (tmp_path / "cut.pth", [], "cut.pth"),
        (tmp_path / "bad.pkl", [], "--allow-pickle"),
        (tmp_path / "R-50.pkl", [], "Caffe2"),
        ("timm://no/name", [], "timm://no/name"),
        (trained, ["--into", tmp_path / "none.pth"], "none.pth"),
    ):
        assert run("--input", source, "--output", output, "--to", "detector", *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error and error.count("\n") == 1, error
    assert run("--input", trained, "--output", tmp_path / "out.txt", "--to", "detector") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R-50.pkl", "bad.pkl", "cut.pth"]
    assert run("--input", tmp_path / "bad.pkl", "--output", output, "--to", "backbone", "--allow-pickle") == 0
    assert (tmp_path / "ran").exists() and sorted(read_checkpoint(output)["model"]) == ["res2.w", "stem.w"]


@pytest.mark.parametrize("to", ["backbone", "detector", "into"])
def test_a_converted_classifier_says_which_pixels_it_takes(to, trained, tmp_path, capsys):
    """The head, by which a classifier is known, is gone: without a word beside them its weights would meet pixels of
    another order."""
    classifier = HaloNet(get_cfg_variant(), num_classes=3, out_features=["linear"])
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    into = ["--into", trained] if to == "into" else []
    output = tmp_path / "converted.safetensors"
    assert (
        run("--input", tmp_path / "classifier.pth", "--output", output, "--to", "detector" if into else to, *into) == 0
    )
    assert "RGB with std 58.395 57.12 57.375" in capsys.readouterr().out
    model = build_model(cached_config("mask_rcnn_halo_h3", *SMALL))  # its images are BGR
    Checkpointer(model).load(str(output))
    expected = classifier.state_dict()["stem.conv1.conv.weight"].flip(1)
    assert torch.equal(model.state_dict()["backbone.bottom_up.stem.conv1.conv.weight"], expected)


def test_block_and_halo_go_along(trained, tmp_path):
    Checkpointer(build_model(cached_config("mask_rcnn_halo_h3", *SMALL)), str(tmp_path)).save("model_final")
    assert run("--input", tmp_path / "model_final.pth", "--output", tmp_path / "timm.pth", "--to", "timm") == 0
    assert read_checkpoint(tmp_path / "timm.pth")["metadata"].items() >= {"block_size": "10", "halo_size": "3"}.items()


def get_cfg_variant():
    """The network of SMALL."""
    fields = {key: KWARGS[key] for key in ("depths", "base_width", "num_heads")}
    return dataclasses.replace(VARIANTS["H3"], **fields)
