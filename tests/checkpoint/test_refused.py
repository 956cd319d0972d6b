"""Files that fit only in part: of deeper networks, other preprocessing, other windows, other optimizers."""

import argparse
import dataclasses
import os

from halodet.checkpoint import Checkpointer, ModelSpec, check_fit, load_weights, match, read_checkpoint
from halodet.checkpoint.preprocessing import Preprocessing
from halodet.engine.startup import build_meta_model, check_weights
from halodet.errors import CheckpointError
from halodet.models import VARIANTS, HaloNet

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from helpers import cached_config
from torchvision.models import resnet50, resnet101

LIGHT = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "16",
    "MODEL.FPN.OUT_CHANNELS",
    "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "32",
]
SMALL = "quick/mask_rcnn_halo_small"


def detector(config, *opts):
    return build_model(cached_config(config, *LIGHT, *opts))


def refuse(model, state, words, *, exact=False, **entries):
    with pytest.raises(CheckpointError, match=words):
        check_fit(ModelSpec.of(model), {"model": state, **entries}, "x.pth", min_loaded=0.95, exact=exact)


def meta_model(config):
    return build_meta_model(cached_config(config, "MODEL.DEVICE", "cpu"))


@pytest.mark.parametrize("config", ["mask_rcnn_r50", "mask_rcnn_r50_se"])
def test_a_deeper_resnet(config):
    with torch.device("meta"):
        state = resnet101().state_dict()
        refuse(meta_model(config), state, r"255 .*\(res4\).*res4.6.conv1.*\(256, 1024, 1, 1\)|255 .*\(res4\)")


def test_a_deeper_halonet_even_where_all_of_the_model_is_filled():
    deep, model = detector(SMALL, "MODEL.HALONET.DEPTHS", "[1, 2, 3, 1]"), detector(SMALL)
    refuse(model, deep.state_dict(), r"\(res4\)", exact=True)
    assert len(match(ModelSpec.of(model), {"model": deep.state_dict()}).sources) == len(ModelSpec.of(model).shapes)


def test_squeeze_excitation_that_the_model_lacks():
    source = detector(SMALL, "MODEL.HALONET.SE_RATIO", "0.25").state_dict()
    for exact in (True, False):
        refuse(detector(SMALL), source, "res3", exact=exact)


def test_heads_that_the_model_lacks_as_a_whole_are_allowed_and_layers_of_those_it_has_are_not():
    source = detector(SMALL).state_dict()
    faster = detector(SMALL, "MODEL.MASK_ON", "False")
    assert check_fit(ModelSpec.of(faster), {"model": source}, "x.pth", min_loaded=0.95, exact=True).model_share == 1
    refuse(detector(SMALL, "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"), source, r"\(roi_heads.mask\)", exact=True)


def test_a_stem_of_another_kind():
    state = resnet50().state_dict()
    first = state.pop("conv1.weight")
    state |= {f"conv1.{i}.weight": first for i in (0, 3, 6)}
    refuse(meta_model("mask_rcnn_r50"), state, "first convolution backbone.bottom_up.stem.conv1.weight")


def test_group_norms_are_no_folded_batch_norms():
    names = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_MASK_HEAD")]
    gn = detector("mask_rcnn_r50", *(word for name in names for word in (name, "GN"))).state_dict()
    frozen = detector("mask_rcnn_r50", *(word for name in names for word in (name, "FrozenBN")))
    refuse(frozen, gn, "running_mean", __author__="Detectron2 Model Zoo")


def test_unknown_preprocessing_of_a_detector_is_noted():
    model = detector("mask_rcnn_r50")
    notes = match(ModelSpec.of(model), {"model": model.state_dict(), "__author__": "Detectron2 Model Zoo"}).notes
    assert len(notes) == 1 and "BGR with std 57.375, 57.12, 58.395" in notes[0]


def test_pixels_of_timm_backbones_are_adapted_too():
    pytest.importorskip("timm", reason="timm is not installed")
    model = detector("mask_rcnn_halonet26t")
    state = {name: torch.randn_like(value.float()) for name, value in model.state_dict().items()}
    metadata = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)).metadata()
    found = match(ModelSpec.of(model), {"model": state, "metadata": metadata})
    stem = "backbone.bottom_up.stem.conv1.conv.weight"
    expected = state[stem].flip(1) * torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    torch.testing.assert_close(found.sources[stem].make(), expected)
    assert any("BGR with std 1, 1, 1 to RGB with std 58.395" in note for note in found.notes)


def test_the_mean_of_timms_arguments_is_used():
    model = detector(SMALL)
    state = HaloNet(
        dataclasses.replace(VARIANTS["H1"], depths=(1, 2, 2, 1), base_width=32, stem_channels=32, bottleneck_ratio=2.0)
    ).state_dict()
    notes = match(
        ModelSpec.of(model), {"model": state, "args": argparse.Namespace(mean=[0.5] * 3, std=[0.5] * 3)}
    ).notes
    assert any("from RGB with std 127.5, 127.5, 127.5" in note for note in notes)


def check(*opts):
    cfg = cached_config(SMALL, *LIGHT, *opts)
    return check_weights(cfg, build_meta_model(cfg), eval_only=True)


def test_pixels_and_windows_of_an_evaluation_are_checked_before_anything_long(tmp_path):
    Checkpointer(detector(SMALL), str(tmp_path)).save("model")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    for change, words in (
        (
            ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"],
            r"INPUT.FORMAT BGR.*57.375.*\[1.0, 1.0, 1.0\]",
        ),
        (
            ["MODEL.HALONET.BLOCK_SIZE", "10", "MODEL.HALONET.HALO_SIZE", "2"],
            "block_size=8, halo_size=3.*block_size=10, halo_size=2",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            check(*weights, *change)
    assert check(*weights)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can try to read as somebody else")
def test_a_file_of_somebody_else(tmp_path):
    (tmp_path / "secret.pth").write_bytes(b"x")
    (tmp_path / "secret.pth").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders are for their owner only
        if folder.stat().st_mode & 0o777 == 0o700 and "pytest" in str(folder):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"secret.pth .*Permission denied"):
            read_checkpoint(tmp_path / "secret.pth")
    finally:
        os.seteuid(0)


class Run:
    """The part of a trainer that a checkpoint holds."""

    def __init__(self, model, kind, **options):
        self._trainer = SimpleTrainer(model, [], kind(model.parameters(), lr=0.1, **options))

    def state_dict(self):
        return {"iteration": 1, "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state):
        self._trainer.load_state_dict(state["_trainer"])


@pytest.mark.parametrize("kinds", [("SGD", "AdamW"), ("AdamW", "SGD")])
def test_resuming_with_another_optimizer(tmp_path, kinds):
    made = {"SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), "AdamW": torch.optim.AdamW}
    torch.manual_seed(1)
    source, model = detector(SMALL), detector(SMALL)
    Checkpointer(source, str(tmp_path), trainer=Run(source, made[kinds[0]])).save("model_0000001")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"model_0000001.pth.*{kinds[1]}"):
        Checkpointer(model, str(tmp_path), trainer=Run(model, made[kinds[1]])).resume_or_load("")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    Checkpointer(model, str(tmp_path), trainer=Run(model, made[kinds[0]])).resume_or_load("")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_missing_file():
    with pytest.raises(CheckpointError, match="gone.pth"):
        check("MODEL.WEIGHTS", "gone.pth")
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS"):
        load_weights(detector(SMALL), "")
