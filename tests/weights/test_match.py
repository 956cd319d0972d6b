"""Which tensor of a file fills which one of a model: our names, timm's, wrappers, classifiers, tables, Detectron2's heuristics."""

import dataclasses

from halodet.backbones import VARIANTS, HaloNet
from halodet.engine import load_config
from halodet.weights import Target, match
from halodet.weights.report import LoadReport
from halodet.weights.tables import resize_table

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dataclasses.replace(
    VARIANTS["H1"], depths=(1, 2, 2, 1), base_width=32, stem_channels=32, bottleneck_ratio=2.0, block_size=8, halo_size=3, final_channels=24
)
PREFIX = "backbone.bottom_up."


def small_detector(*opts):
    torch.manual_seed(1)
    return build_model(load_config("quick/mask_rcnn_halo_small", ["MODEL.HALONET.NORM", "BN", *opts]))


def classifier(**changes):
    torch.manual_seed(2)
    return HaloNet(dataclasses.replace(SMALL, **changes), num_classes=10, out_features=["linear"])


def filled(model, state, **entries):
    """What ``state`` fills of ``model``: (the match, values by name)."""
    found = match(Target.of(model), {"model": state, **entries})
    return found, {name: fill.make() for name, fill in found.fills.items()}


def weights(state):
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.model.net."])
def test_our_own_checkpoint_under_any_wrapper(prefix):
    model = small_detector()
    state = {prefix + name: torch.randn_like(value.float()) for name, value in model.state_dict().items()}
    found, values = filled(small_detector(), state)
    assert values.keys() == weights(model.state_dict()).keys()
    assert all(torch.equal(value, state[prefix + name]) for name, value in values.items())
    assert found.notes == ([f"prefix {prefix} taken off the file's names"] if prefix else [])
    assert found.whole and not found.unexpected and not found.missing


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_classifier_fills_the_backbone_of_a_detector(prefix):
    source, model = classifier(), small_detector()
    found, values = filled(model, {prefix + name: value for name, value in source.state_dict().items()})
    inner = {name: value for name, value in weights(source.state_dict()).items() if not name.startswith("head.")}
    assert values.keys() == {PREFIX + name for name in inner} == {n for n in weights(model.state_dict()) if n.startswith(PREFIX)}
    for name, value in inner.items():
        # timm trains on RGB; the config's images are BGR, with the same deviations.
        assert torch.equal(values[PREFIX + name], value.flip(1) if name == "stem.conv1.conv.weight" else value), name
    assert {name.removeprefix(prefix) for name in found.not_used} == {n for n in weights(source.state_dict()) if n.startswith("head.")}
    assert not found.whole and not found.unexpected and set(found.expected) == set(values)


def test_a_backbone_alone_or_by_a_detectors_names_is_not_adapted():
    source, model = classifier(), small_detector()
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
    for prefix in ("", "backbone.", PREFIX):
        found, values = filled(model, {prefix + name: value for name, value in state.items()})
        assert torch.equal(values[PREFIX + "stem.conv1.conv.weight"], state["stem.conv1.conv.weight"])
        assert LoadReport("x", found).share == 1.0 and len(found.fills) == len(found.expected)


def test_a_classifier_fills_a_classifier():
    source = classifier()
    found, values = filled(classifier(), source.state_dict())
    assert values.keys() == weights(source.state_dict()).keys() == set(found.expected)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in values.items())


class _TimmDetector(nn.Module):
    """A detector around timm's own modules, under the names of a timm backbone."""

    def __init__(self, network):
        super().__init__()
        bottom_up = nn.Module()
        bottom_up.stem, bottom_up.stages = network.stem, network.stages
        self.backbone = nn.Module()
        self.backbone.fpn_lateral2 = nn.Conv2d(3, 3, 1)
        self.backbone.bottom_up = bottom_up


def test_timms_names_fill_a_timm_backbone():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    network = timm.create_model("haloregnetz_b")  # it has a final_conv, which this backbone does without
    with torch.device("meta"):
        model = _TimmDetector(timm.create_model("haloregnetz_b"))
    found, values = filled(model, network.state_dict())
    expected = {n: v for n, v in weights(network.state_dict()).items() if n.startswith(("stem.", "stages."))}
    assert values.keys() == {PREFIX + name for name in expected}
    assert all(torch.equal(values[PREFIX + name], value) for name, value in expected.items())
    assert {name.split(".")[0] for name in found.not_used} == {"final_conv", "head"} and not found.unexpected
    assert not found.missing and LoadReport("x", found).share == 1.0


def test_tables_of_another_block_or_halo_are_resized_by_offset():
    source, model = classifier(), small_detector("MODEL.HALONET.HALO_SIZE", "2")
    found, values = filled(model, source.state_dict())
    tables = {name for name in values if name.endswith("_rel")}
    assert tables and {name for name, fill in found.fills.items() if fill.resized} == tables
    for name in tables:
        old = source.state_dict()[name.removeprefix(PREFIX)]
        assert torch.equal(values[name], resize_table(old, (8, 3), (8, 2))) and values[name].shape == model.state_dict()[name].shape
    assert any("resized by offset from block 8, halo 3" in note and "to block 8, halo 2" in note for note in found.notes)
    assert match(Target.of(model), {"model": source.state_dict()}, exact=True).fills.keys() == set(), "an exact file has the model's names"
    whole = small_detector().state_dict()
    exact = match(Target.of(model), {"model": whole}, exact=True)
    assert exact.mismatched.keys() == tables


def test_tables_are_told_apart_by_what_the_file_says_where_their_lengths_agree():
    source = classifier(block_size=12, halo_size=2)
    model = small_detector("MODEL.HALONET.BLOCK_SIZE", "10", "MODEL.HALONET.HALO_SIZE", "3")
    name = "res4.0.mixer.pos_embed.width_rel"
    found, values = filled(model, source.state_dict())
    assert torch.equal(values[PREFIX + name], source.state_dict()[name]) and not any("resized" in note for note in found.notes)
    found, values = filled(model, source.state_dict(), metadata={"block_size": "12", "halo_size": "2"})
    assert torch.equal(values[PREFIX + name], resize_table(source.state_dict()[name], (12, 2), (10, 3)))
    assert found.fills[PREFIX + name].resized


def test_tables_of_another_depth_are_mismatched():
    source, model = classifier(num_heads=(4, 8, 8, 8)), small_detector("MODEL.HALONET.NUM_HEADS", "(4, 8, 4, 4)")
    found, _ = filled(model, source.state_dict())
    tables = {n for n in weights(model.state_dict()) if n.endswith("_rel") and "res4" in n}
    assert tables <= found.mismatched.keys() and LoadReport("x", found).share < 1.0


def test_another_number_of_classes_is_mismatched_and_counted():
    source, model = small_detector(), small_detector("MODEL.ROI_HEADS.NUM_CLASSES", "3")
    found, values = filled(model, source.state_dict())
    assert len(found.mismatched) == 6 and all("predictor" in name for name in found.mismatched)
    classes = source.roi_heads.num_classes
    assert found.mismatched["roi_heads.box_predictor.cls_score.bias"] == ((classes + 1,), (4,))
    sizes = {name: value.numel() for name, value in weights(model.state_dict()).items()}
    share = sum(sizes[name] for name in values) / sum(sizes.values())
    assert LoadReport("x", found).share == pytest.approx(share) and 0.5 < share < 1


def test_detectron2s_heuristics_match_the_end_of_a_name():
    model = small_detector()
    state = {name.removeprefix("backbone.").removeprefix("bottom_up."): value for name, value in weights(model.state_dict()).items()}
    state |= {"fpn_lateral2.weight": torch.randn(64, 64, 1, 1)}
    plain, _ = filled(model, state)
    found, values = filled(model, state, matching_heuristics=True)
    assert "backbone.fpn_lateral2.weight" in values and "backbone.fpn_lateral2.weight" not in plain.fills
    assert torch.equal(values["backbone.fpn_lateral2.weight"], state["fpn_lateral2.weight"])
    assert values.keys() == weights(model.state_dict()).keys() and found.naming == "Detectron2's matching heuristics"


def test_a_file_of_other_names_fills_nothing():
    model = small_detector()
    for state in ({}, {"encoder.layer.0.weight": torch.ones(3)}, {"a.b": torch.ones(1), "c": torch.ones(())}):
        found, _ = filled(model, state)
        assert not found.fills and len(found.unexpected) == len(state) and LoadReport("x", found).share == 0.0
        assert "all" in str(LoadReport("x", found))


def test_nothing_is_copied_or_changed_by_matching():
    source, model = classifier(), small_detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = source.state_dict()
    kept = dict(state)
    match(Target.of(model), {"model": state})
    assert state == kept and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
