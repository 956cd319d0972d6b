"""The table that follows every load, counted again by hand."""

from halodet.checkpoint import LoadReport, ModelSpec, match
from halodet.checkpoint.report import group_of, percent

import pytest
import torch
from torch import nn


class Tiny(nn.Module):
    """The names of a detector, one tensor or two in each place."""

    def __init__(self):
        super().__init__()
        bottom_up = nn.Module()
        bottom_up.stem = nn.Module()
        bottom_up.stem.conv = nn.Conv2d(3, 4, 1, bias=False)  # 12
        bottom_up.stages = nn.ModuleList([nn.Linear(2, 5), nn.Linear(5, 2)])  # 15, 12
        self.backbone = nn.Module()
        self.backbone.fpn_output2 = nn.Linear(2, 2, bias=False)  # 4
        self.backbone.bottom_up = bottom_up
        self.roi_heads = nn.Module()
        self.roi_heads.box_head = nn.Linear(3, 1)  # 4
        self.roi_heads.box_predictor = nn.Linear(1, 6)  # 12


def report(drop=(), change=()):
    state = {name: value for name, value in Tiny().state_dict().items() if name not in drop}
    state |= {name: torch.zeros(7) for name in change}
    return LoadReport("a.pth", match(ModelSpec.of(Tiny()), {"model": state}))


def test_groups_and_counts():
    found = report(drop=["backbone.bottom_up.stages.1.bias"], change=["roi_heads.box_predictor.bias", "extra.one"])
    rows = {row[0]: row[1:] for row in found.rows()}
    assert list(rows) == ["stem", "stages.0", "stages.1", "fpn", "roi_heads.box", "all"]
    assert rows["stem"] == (1, 1, 0, 0, 0, 1.0)
    assert rows["stages.1"] == (2, 1, 0, 1, 0, pytest.approx(10 / 12))
    assert rows["roi_heads.box"] == (4, 3, 0, 0, 1, pytest.approx(10 / 16))
    assert rows["all"] == (10, 8, 0, 1, 1, pytest.approx(51 / 59))
    assert found.share == found.model_share == pytest.approx(51 / 59) and found.backbone_share == pytest.approx(37 / 39)
    text = str(found)
    assert (
        "a.pth" in text
        and "Loaded 86.4 % of the expected parameters (10 tensors of the model), 94.8 % of the backbone" in text
    )
    assert "Unexpected: 1 tensors, extra.one" in text
    assert "roi_heads.box_predictor.bias (7,) in the file, (6,) in the model" in text


def test_a_percentage_is_never_rounded_up_to_all():
    assert percent(0.99999) == "99.9 %" and percent(1.0) == "100.0 %" and percent(0.0) == "0.0 %"


def test_groups_of_other_models():
    assert group_of("backbone.bottom_up.res4.3.conv1.weight", "backbone.bottom_up.") == "res4"
    assert group_of("backbone.top_block.p6.weight", "backbone.bottom_up.") == "fpn"
    assert group_of("roi_heads.mask_head.predictor.weight", "backbone.bottom_up.") == "roi_heads.mask"
    assert group_of("proposal_generator.rpn_head.conv.weight", "backbone.bottom_up.") == "proposal_generator"
    assert group_of("head.linear.weight", "") == "head"
