"""Conversions in both directions: every tensor is bit-equal, and what is left out is listed."""

import dataclasses

from halodet.checkpoint.key_mapping import convert
from halodet.errors import CheckpointError
from halodet.models import HaloNet

import pytest
import torch
from detectron2.modeling import build_model
from helpers import assert_same_tensors, cached_config

OPTIONS = ["MODEL.DEVICE", "cpu", "MODEL.HALONET.NORM", "BN"]


def randomised(model):
    """The model's state dict, all of it different from what any model starts with."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(t.shape, generator=generator) + 0.5 if t.is_floating_point() else t + 7
        for name, t in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def detector():
    return randomised(build_model(cached_config("quick/mask_rcnn_halo_small", *OPTIONS)))


@pytest.fixture(scope="module")
def classifier():
    cfg = cached_config("quick/mask_rcnn_halo_small", *OPTIONS)
    backbone = build_model(cfg).backbone.bottom_up
    return randomised(HaloNet(dataclasses.replace(backbone.variant, final_channels=40), num_classes=3))


def test_detector_to_timm_and_back_into_the_detector(detector):
    there = convert(detector, "timm")
    assert there.source == "detector" and not any(name.startswith("backbone.") for name in there.tensors)
    assert {f"backbone.bottom_up.{name}" for name in there.tensors} | set(there.left_out) == set(detector)
    assert any("roi_heads" in name for name in there.left_out) and any("fpn" in name for name in there.left_out)
    blank = {name: torch.zeros_like(t) if name.startswith("backbone.bottom_up.") else t for name, t in detector.items()}
    back = convert(there.tensors, "detector", into=blank)
    assert (back.filled, back.unfilled, back.left_out) == (len(there.tensors), [], {})
    assert_same_tensors(back.tensors, detector)


def test_classifier_to_detector_and_back(detector, classifier):
    there = convert(classifier, "detector")
    assert there.source == "classifier"
    assert set(there.left_out) == {name for name in classifier if name.startswith("head.")} != set()
    assert set(there.tensors) == {name for name in detector if name.startswith("backbone.bottom_up.")}
    assert_same_tensors(convert(there.tensors, "backbone").tensors, convert(classifier, "backbone").tensors)
    assert_same_tensors(convert(classifier, "timm").tensors, classifier)
    assert_same_tensors(convert(classifier, "classifier").tensors, classifier)


def test_the_heads_of_the_detector_that_is_filled_stay(detector, classifier):
    done = convert(classifier, "detector", into=detector)
    assert list(done.tensors) == list(detector)
    for name, tensor in done.tensors.items():
        inside = name.removeprefix("backbone.bottom_up.")
        assert torch.equal(tensor, detector[name] if inside == name else classifier[inside])
    assert done.filled == sum(name.startswith("backbone.bottom_up.") for name in detector)
    assert all(name.startswith("head.") for name in done.left_out)


def test_a_detector_into_a_detector_lists_the_heads_not_taken(detector):
    other = {name: tensor + 1 for name, tensor in detector.items()}
    done = convert(other, "detector", into=detector)
    assert set(done.left_out) == {name for name in detector if not name.startswith("backbone.bottom_up.")}
    assert all(torch.equal(t, (detector if name in done.left_out else other)[name]) for name, t in done.tensors.items())


def test_a_detector_as_a_detector_is_unchanged(detector):
    assert_same_tensors(convert(detector, "detector").tensors, detector)
    bare = {name.replace("backbone.bottom_up.", "backbone."): tensor for name, tensor in detector.items()}
    assert list(convert(bare | {"x.y": torch.ones(1)}, "backbone").left_out)[-1] == "x.y"  # without FPN


def test_what_the_input_does_not_have_is_listed(detector, classifier):
    part = {
        name: tensor
        for name, tensor in classifier.items()
        if not name.startswith("res5.") and "num_batches_tracked" not in name
    }
    done = convert(part, "detector", into=detector)
    assert (
        set(done.unfilled)
        == {n for n in detector if n.startswith("backbone.bottom_up.") and n[19:] not in part}
        != set()
    )
    assert all(torch.equal(done.tensors[name], detector[name]) for name in done.unfilled)


def test_names_of_wrappers_are_taken_off(classifier):
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in classifier.items()}
    assert_same_tensors(convert(wrapped, "timm").tensors, classifier)


def test_networks_of_timm_keep_timms_names_in_a_detector():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        theirs = timm.create_model("lamhalobotnet50ts_256").state_dict()
    done = convert(theirs, "detector")
    assert set(done.left_out) == {"head.fc.weight", "head.fc.bias"}
    assert set(done.tensors) == {f"backbone.bottom_up.{name}" for name in theirs if name not in done.left_out}
    assert set(convert(done.tensors, "timm").tensors) == set(theirs) - set(done.left_out)


def test_what_cannot_be_converted(detector, classifier):
    wrong = dict(classifier, **{"res2.0.conv1.conv.weight": torch.ones(1, 2, 3, 4)})
    for arguments, options, reason in (
        ((wrong, "detector"), {"into": detector}, r"res2.0.conv1.conv.weight .*\(1, 2, 3, 4\)"),
        ((classifier, "detector"), {"into": classifier}, "into"),
        ((classifier, "timm"), {"into": detector}, "timm"),
        (({"layer1.0.weight": torch.ones(1)}, "detector"), {}, "layer1.0.weight"),
        (
            ({"stages.0.0.x": torch.ones(1)}, "detector"),
            {"into": detector},
            "backbone.bottom_up.stem",
        ),
        ((classifier, "onnx"), {}, "form='onnx'"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            convert(*arguments, **options)
