"""Matching of files with models: HaloNet's and timm's names, wrappers, classifiers, tables, matching heuristics."""

import dataclasses

from halodet.checkpoint import ModelSpec, match
from halodet.checkpoint.preprocessing import Preprocessing
from halodet.checkpoint.report import LoadReport
from halodet.mixers.rel_pos import resize_table
from halodet.models import VARIANTS, HaloNet

import pytest
import torch
from detectron2.modeling import build_model
from helpers import cached_config

SMALL = dataclasses.replace(
    VARIANTS["H1"],
    depths=(1, 2, 2, 1),
    base_width=32,
    stem_channels=32,
    bottleneck_ratio=2.0,
    block_size=8,
    halo_size=3,
    final_channels=24,
)
PREFIX = "backbone.bottom_up."


def small_detector(*opts):
    torch.manual_seed(1)
    return build_model(cached_config("quick/mask_rcnn_halo_small", "MODEL.HALONET.NORM", "BN", *opts))


def classifier(**changes):
    torch.manual_seed(2)
    return HaloNet(dataclasses.replace(SMALL, **changes), num_classes=10, out_features=["linear"])


def filled(model, state, **entries):
    """What ``state`` fills of ``model``: (the match, values by name)."""
    found = match(ModelSpec.of(model), {"model": state, **entries})
    return found, {name: source.make() for name, source in found.sources.items()}


def weights(state):
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.model.net."])
def test_our_own_checkpoint_under_any_wrapper(prefix):
    model = small_detector()
    state = {prefix + name: torch.randn_like(value.float()) for name, value in model.state_dict().items()}
    found, values = filled(small_detector(), state)
    assert values.keys() == weights(model.state_dict()).keys()
    assert all(torch.equal(value, state[prefix + name]) for name, value in values.items())
    assert (
        len(found.notes) == 1 + bool(prefix) and prefix in found.notes[0] and "BGR with std 57.375" in found.notes[-1]
    )
    assert found.whole and not found.unexpected and not found.missing


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_classifier_fills_the_backbone_of_a_detector(prefix):
    source, model = classifier(), small_detector()
    found, values = filled(model, {prefix + name: value for name, value in source.state_dict().items()})
    inner = {name: value for name, value in weights(source.state_dict()).items() if not name.startswith("head.")}
    assert (
        values.keys()
        == {PREFIX + name for name in inner}
        == {n for n in weights(model.state_dict()) if n.startswith(PREFIX)}
    )
    for name, value in inner.items():
        # timm trains on RGB; the config's images are BGR, with the same deviations.
        assert torch.equal(values[PREFIX + name], value.flip(1) if name == "stem.conv1.conv.weight" else value), name
    assert {name.removeprefix(prefix) for name in found.unused} == {
        n for n in weights(source.state_dict()) if n.startswith("head.")
    }
    assert not found.whole and not found.unexpected and set(found.expected) == set(values)


def test_a_backbone_alone_or_by_a_detectors_names_is_not_adapted():
    source, model = classifier(), small_detector()
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("head.")}
    for prefix in ("", "backbone.", PREFIX):
        found, values = filled(model, {prefix + name: value for name, value in state.items()})
        assert torch.equal(values[PREFIX + "stem.conv1.conv.weight"], state["stem.conv1.conv.weight"])
        assert LoadReport("x", found).share == 1.0 and len(found.sources) == len(found.expected)


def test_a_classifier_fills_a_classifier():
    source = classifier()
    found, values = filled(classifier(), source.state_dict())
    assert values.keys() == weights(source.state_dict()).keys() == set(found.expected)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in values.items())


@pytest.mark.parametrize("config", ["haloregnetz_b", "eca_halonext26ts", "halo2botnet50ts"])
def test_timms_names_fill_a_timm_backbone(config):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    cfg = cached_config(f"mask_rcnn_{config}", "MODEL.DEVICE", "cpu")
    network, model = timm.create_model(cfg.MODEL.HALODET_TIMM.NAME), build_model(cfg)
    known = {key: network.default_cfg[key] for key in ("mean", "std")}
    kinds = {"__author__": "timm", "matching_heuristics": True, "metadata": known}
    for entries in ({}, kinds):  # a file of timm, and what timm:// makes of it
        found, values = filled(model, network.state_dict(), **entries)
        expected = {n: v for n, v in weights(network.state_dict()).items() if not n.startswith("head.")}
        assert values.keys() == {PREFIX + name for name in expected}
        assert all(torch.equal(values[PREFIX + name], value) for name, value in expected.items())
        assert {name.split(".")[0] for name in found.unused} == {"head"} and not found.unexpected and not found.missing
        assert LoadReport("x", found).share == LoadReport("x", found).backbone_share == 1.0


def test_timms_final_conv_is_not_used_where_the_backbone_has_none():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    cfg = cached_config(
        "mask_rcnn_haloregnetz_b",
        *[
            "MODEL.DEVICE",
            "cpu",
            "MODEL.HALODET_TIMM.OUT_FEATURES",
            "['res2', 'res3', 'res4']",
            "MODEL.FPN.IN_FEATURES",
            "['res2', 'res3', 'res4']",
            "MODEL.RPN.IN_FEATURES",
            "['p2', 'p3', 'p4', 'p5']",
            "MODEL.ROI_HEADS.IN_FEATURES",
            "['p2', 'p3', 'p4']",
            "MODEL.ANCHOR_GENERATOR.SIZES",
            "[[32], [64], [128], [256]]",
        ],
    )
    found, _ = filled(build_model(cfg), timm.create_model("haloregnetz_b").state_dict())
    assert {name.split(".")[0] for name in found.unused} == {"head", "final_conv"} and not found.missing
    assert {name.split(".")[1] for name in found.unexpected} == {"3"}  # the stage that is not built


@pytest.mark.parametrize("whole", [False, True])
def test_preprocessing_in_the_metadata_comes_first(whole):
    """Saved by our own conversion, the convention holds for a backbone by any name, and for a detector filled with
    one."""
    source, model = classifier(), small_detector()
    state = {PREFIX + n: v for n, v in source.state_dict().items() if not n.startswith("head.")}
    state |= {n: v for n, v in model.state_dict().items() if not n.startswith(PREFIX)} if whole else {}
    metadata = Preprocessing("RGB", (127.5, 127.5, 127.5), (127.5, 51.0, 25.5)).metadata()
    found, values = filled(model, state, metadata=metadata)
    stem = source.state_dict()["stem.conv1.conv.weight"]
    factors = [57.375 / 25.5, 57.12 / 51.0, 58.395 / 127.5]  # the config's BGR deviations over the file's
    expected = torch.stack([stem[:, 2 - i] * factor for i, factor in enumerate(factors)], 1)
    torch.testing.assert_close(values[PREFIX + "stem.conv1.conv.weight"], expected)
    assert any("PIXEL_MEAN" in note for note in found.notes) and found.whole == whole
    _, again = filled(
        model, source.state_dict(), metadata={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.2, 0.1)}
    )  # as timm writes it
    torch.testing.assert_close(again[PREFIX + "stem.conv1.conv.weight"], expected)
    _, other = filled(
        model, source.state_dict(), metadata={"pixel_std": "none", "pixel_mean": "", "input_format": "grey"}
    )
    assert torch.equal(other[PREFIX + "stem.conv1.conv.weight"], stem.flip(1)), "metadata of another program is ignored"


def test_tables_of_another_block_or_halo_are_resized_by_offset():
    source, model = classifier(), small_detector("MODEL.HALONET.HALO_SIZE", "2")
    found, values = filled(model, source.state_dict())
    tables = {name for name in values if name.endswith("_rel")}
    assert tables and {name for name, source in found.sources.items() if source.resized} == tables
    for name in tables:
        old = source.state_dict()[name.removeprefix(PREFIX)]
        assert (
            torch.equal(values[name], resize_table(old, (8, 3), (8, 2)))
            and values[name].shape == model.state_dict()[name].shape
        )
    assert any("from block_size=8, halo_size=3 to block_size=8, halo_size=2" in note for note in found.notes)
    assert match(ModelSpec.of(model), {"model": source.state_dict()}, exact=True).sources.keys() == set(), (
        "an exact file has the model's names"
    )
    whole = small_detector().state_dict()
    exact = match(ModelSpec.of(model), {"model": whole}, exact=True)
    assert exact.mismatched.keys() == tables


def test_metadata_distinguishes_tables_of_the_same_length():
    source = classifier(block_size=12, halo_size=2)
    model = small_detector("MODEL.HALONET.BLOCK_SIZE", "10", "MODEL.HALONET.HALO_SIZE", "3")
    name = "res4.0.mixer.pos_embed.width_rel"
    found, values = filled(model, source.state_dict())
    assert torch.equal(values[PREFIX + name], source.state_dict()[name]) and not any(
        "resized" in note for note in found.notes
    )
    found, values = filled(model, source.state_dict(), metadata={"block_size": "12", "halo_size": "2"})
    assert torch.equal(values[PREFIX + name], resize_table(source.state_dict()[name], (12, 2), (10, 3)))
    assert found.sources[PREFIX + name].resized


def test_tables_of_another_depth_are_mismatched():
    source, model = classifier(num_heads=(4, 8, 8, 8)), small_detector("MODEL.HALONET.NUM_HEADS", "(4, 8, 4, 4)")
    found, _ = filled(model, source.state_dict())
    tables = {n for n in weights(model.state_dict()) if n.endswith("_rel") and "res4" in n}
    assert tables <= found.mismatched.keys() and LoadReport("x", found).share < 1.0


def test_predictors_of_another_number_of_classes_are_listed_and_not_expected():
    source, model = small_detector(), small_detector("MODEL.ROI_HEADS.NUM_CLASSES", "3")
    found, values = filled(model, source.state_dict())
    assert len(found.initialized) == 6 and all("predictor" in name for name in found.initialized)
    assert not found.mismatched and not set(values) & set(found.initialized)
    sizes = {name: value.numel() for name, value in weights(model.state_dict()).items()}
    share = sum(sizes[name] for name in values) / sum(sizes.values())
    report = LoadReport("x", found)
    assert report.share == 1 and report.model_share == pytest.approx(share) and 0.5 < share < 1
    assert "roi_heads.box_predictor.cls_score.weight" in str(report)


def test_detectron2s_heuristics_match_the_end_of_a_name():
    model = small_detector()
    state = {
        name.removeprefix("backbone.").removeprefix("bottom_up."): value
        for name, value in weights(model.state_dict()).items()
    }
    state |= {"fpn_lateral2.weight": torch.randn(64, 64, 1, 1)}
    plain, _ = filled(model, state)
    found, values = filled(model, state, matching_heuristics=True)
    assert "backbone.fpn_lateral2.weight" in values and "backbone.fpn_lateral2.weight" not in plain.sources
    assert torch.equal(values["backbone.fpn_lateral2.weight"], state["fpn_lateral2.weight"])
    assert values.keys() == weights(model.state_dict()).keys() and found.key_mapping == "Detectron2 matching heuristics"


def test_a_file_of_other_names_fills_nothing():
    model = small_detector()
    for state in ({}, {"encoder.layer.0.weight": torch.ones(3)}, {"a.b": torch.ones(1), "c": torch.ones(())}):
        found, _ = filled(model, state)
        assert not found.sources and len(found.unexpected) == len(state) and LoadReport("x", found).share == 0.0
        assert "all" in str(LoadReport("x", found))


def test_nothing_is_copied_or_changed_by_matching():
    source, model = classifier(), small_detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = source.state_dict()
    kept = dict(state)
    match(ModelSpec.of(model), {"model": state})
    assert state == kept and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
