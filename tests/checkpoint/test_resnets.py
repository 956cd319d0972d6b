"""ResNet weights in HaloNet and in Detectron2's ResNet: every tensor, and the feature maps."""

import pickle
import re

from halodet.checkpoint import Checkpointer, ModelSpec, match, read_checkpoint
from halodet.models import VARIANTS, HaloNet

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import cached_config

SMALL = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "16",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "16",
    "MODEL.FPN.NORM",
    "",
    "MODEL.ROI_MASK_HEAD.NORM",
    "",
    "MODEL.HALONET.NORM",
    "BN",
    "MODEL.RESNETS.NORM",
    "BN",
]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def detector(name, *opts):
    torch.manual_seed(1)
    return build_model(cached_config(name, *SMALL, *opts)).eval()


@pytest.fixture(scope="module")
def resnet():
    """torchvision's ResNet-50 with weights and batch norm statistics that are neither 0 nor 1."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                (
                    value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.1)
                ) if value.ndim else None
    return model


def ours(name):
    """A torchvision name as HaloNet's, stated layer by layer."""
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name)
    if not block:
        return {"conv1": "stem.conv1.conv", "bn1": "stem.conv1.norm"}[name.split(".")[0]] + "." + name.split(".")[1]
    stage, index, rest = int(block[1]) + 1, block[2], block[3]
    layer, leaf = rest.rsplit(".", 1)
    layers = {
        "conv1": "conv1.conv",
        "bn1": "conv1.norm",
        "conv2": "mixer.conv",
        "bn2": "norm2",
        "conv3": "conv3.conv",
        "bn3": "conv3.norm",
        "downsample.0": "shortcut.conv",
        "downsample.1": "shortcut.norm",
    }
    return f"res{stage}.{index}.{layers[layer]}.{leaf}"


def caffe2(name):
    """A torchvision name as MSRA's files have it, norms folded to ``s`` and ``b``; None for statistics."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf not in ("weight", "bias"):
        return None
    if name.startswith("fc"):
        return {"weight": "fc1000_w", "bias": "fc1000_b"}[leaf]
    norm = {"weight": "_bn_s", "bias": "_bn_b"}[leaf] if "bn" in name or "downsample.1" in name else "_w"
    if not name.startswith("layer"):
        return "conv1_w" if norm == "_w" else f"res_conv1{norm}"
    stage, index, layer = name.split(".")[:3]
    branch = {"1": "2a", "2": "2b", "3": "2c"}.get(layer[-1], "1")
    return f"res{int(stage[5]) + 1}_{index}_branch{branch}{norm}"


def test_every_tensor_of_torchvisions_resnet_has_its_place(resnet):
    model = detector("mask_rcnn_r50_se_halo_b8h3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpointer = Checkpointer(model)
    file = {"model": resnet.state_dict()}
    found = match(ModelSpec.of(model), file)
    model.load_state_dict({name: source.make() for name, source in found.sources.items()}, strict=False)
    after, untouched = model.state_dict(), set(before)
    for name, value in resnet.state_dict().items():
        if name.startswith("fc") or name.endswith("num_batches_tracked"):
            continue
        goal = "backbone.bottom_up." + ours(name)
        if name.startswith("layer4") and (".conv2." in name or ".bn2." in name):
            assert goal not in found.sources  # attention and its norm are there
            continue
        untouched.remove(goal)
        expected = value.flip(1) if name == "conv1.weight" else value  # the config's images are BGR
        assert torch.equal(after[goal], expected), name
    assert found.sources.keys() == set(before) - untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert found.unused == ["fc.weight", "fc.bias"] and not found.unexpected and not found.mismatched
    assert any("3x3" in note and "layer4.0.conv2.weight" in note for note in found.notes)
    assert any(
        re.search(r"\d+ tensors of squeeze-excitation, \d+ tensors of other mixers", note) for note in found.notes
    )
    assert checkpointer.report is None


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        ("mask_rcnn_r50_se", ["MODEL.HALONET.SE_RATIO", "0.0"]),
        (
            "mask_rcnn_r50_se",
            [
                "MODEL.HALONET.SE_RATIO",
                "0.0",
                "INPUT.FORMAT",
                "RGB",
                "MODEL.PIXEL_MEAN",
                "[123.675, 116.28, 103.53]",
                "MODEL.PIXEL_STD",
                "[58.395, 57.12, 57.375]",
            ],
        ),
        ("mask_rcnn_r50", ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"]),
    ],
)
def test_the_maps_are_torchvisions(resnet, config, opts, tmp_path):
    """The same image with torchvision's preprocessing and the config's gives the same maps."""
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    model = detector(config, *opts)
    checkpointer = Checkpointer(model)
    checkpointer.load(str(tmp_path / "resnet50.pth"))
    assert checkpointer.report.share == checkpointer.report.backbone_share == 1.0
    rgb = torch.rand(3, 5, 7).mul(255)
    rgb = torch.nn.functional.interpolate(rgb[None], size=(64, 96), mode="bicubic")[0].clamp(0, 255).round()
    image = rgb if "RGB" in opts else rgb.flip(0)
    x = (rgb / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        maps = model.backbone.bottom_up(model.preprocess_image([{"image": image}]).tensor)
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x[None]))))
        for number in range(1, 5):
            x, stage = resnet.get_submodule(f"layer{number}")(x), f"res{number + 1}"
            assert maps[stage].shape == x.shape and x.abs().max() > 0.1
            assert (maps[stage] - x).abs().max() <= 1e-4 * x.abs().max(), stage
    adapted = any("stem convolution from RGB" in note for note in checkpointer.report.match.notes)
    assert adapted == ("RGB" not in opts)


def msra(resnet):
    return {caffe2(name): value for name, value in resnet.state_dict().items() if caffe2(name)}


def test_msras_files_fill_what_detectron2_fills(resnet, tmp_path):
    """With MSRA's own convention and frozen norms nothing is adapted: the result is that of Detectron2's
    checkpointer."""
    opts = [
        "MODEL.PIXEL_STD",
        "[1.0, 1.0, 1.0]",
        "MODEL.RESNETS.NORM",
        "FrozenBN",
        "MODEL.RESNETS.STRIDE_IN_1X1",
        "True",
    ]
    theirs, own = detector("mask_rcnn_r50", *opts), detector("mask_rcnn_r50", *opts)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({name: value.numpy() for name, value in msra(resnet).items()}))
    DetectionCheckpointer(theirs).load(str(tmp_path / "R-50.pkl"))
    found = match(ModelSpec.of(own), {"model": msra(resnet), "__author__": "Caffe2", "matching_heuristics": True})
    own.load_state_dict({name: source.make() for name, source in found.sources.items()}, strict=False)
    for name, value in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name
    assert len(found.sources) == 265 and found.unused and not found.unexpected
    assert not any(word in note for note in found.notes for word in ("strides", "FrozenBN only", "stem convolution"))


def test_detectron1s_detectors_fill_what_detectron2_fills(resnet, tmp_path):
    opts = [
        "MODEL.PIXEL_STD",
        "[1.0, 1.0, 1.0]",
        "MODEL.RESNETS.NORM",
        "FrozenBN",
        "MODEL.RESNETS.STRIDE_IN_1X1",
        "True",
    ]
    theirs, own = detector("mask_rcnn_r50", *opts), detector("mask_rcnn_r50", *opts)
    # 80 classes, as here: their background is the first row, Detectron2's the last
    heads = {
        "fpn_inner_res4_5_sum_lateral_w": (16, 1024, 1, 1),
        "fpn_res4_5_sum_b": (16,),
        "conv_rpn_fpn2_w": (16, 16, 3, 3),
        "fc7_b": (16,),
        "rpn_cls_logits_fpn2_b": (3,),
        "cls_score_w": (81, 16),
        "bbox_pred_b": (324,),
        "_[mask]_fcn2_w": (16, 16, 3, 3),
    }
    blobs = msra(resnet) | {name: torch.randn(shape) for name, shape in heads.items()}
    (tmp_path / "model_final.pkl").write_bytes(
        pickle.dumps({"blobs": {name: value.numpy() for name, value in blobs.items()}})
    )
    DetectionCheckpointer(theirs).load(str(tmp_path / "model_final.pkl"))
    checkpointer = Checkpointer(own, min_loaded=0.0)
    checkpointer.load(str(tmp_path / "model_final.pkl"))
    for name, value in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name
    found = checkpointer.report.match
    assert found.whole and len([name for name in found.sources if not name.startswith("backbone.bottom_up.")]) == len(
        heads
    )
    other = match(ModelSpec.of(detector("mask_rcnn_r50")), read_checkpoint(tmp_path / "model_final.pkl"))
    stem = other.sources["backbone.bottom_up.stem.conv1.weight"].make()
    torch.testing.assert_close(stem, resnet.conv1.weight * torch.tensor([57.375, 57.12, 58.395]).view(1, 3, 1, 1))


def test_msras_files_in_halonet_are_noted_where_they_differ(resnet):
    model = detector("mask_rcnn_r50_se")
    found = match(ModelSpec.of(model), {"model": msra(resnet), "__author__": "Caffe2", "matching_heuristics": True})
    stem = found.sources["backbone.bottom_up.stem.conv1.conv.weight"].make()
    scale = torch.tensor([57.375, 57.12, 58.395]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        stem, resnet.conv1.weight * scale
    )  # BGR as the config's, over 1 instead of its deviations
    assert torch.equal(found.sources["backbone.bottom_up.res3.1.norm2.running_mean"].make(), torch.zeros(128))
    assert torch.equal(found.sources["backbone.bottom_up.res3.1.norm2.running_var"].make(), torch.ones(128))
    notes = " / ".join(found.notes)
    assert "FrozenBN only, and the model has BN" in notes
    assert "strides in the 1x1 convolutions, this model in the 3x3" in notes
    assert "from BGR with std 1, 1, 1 to BGR with std 57.375" in notes


def test_torchvisions_weights_as_detectron2_converts_them(resnet):
    """Detectron2's tool renames them and keeps the classifier as ``stem.fc``; its author entry identifies the
    conversion."""
    state = {f"stem.{name}": value for name, value in resnet.state_dict().items() if name.startswith("fc")}
    for name, value in resnet.state_dict().items():
        if not name.startswith("fc"):
            theirs = (
                ours(name).replace("mixer.conv", "conv2.conv").replace("norm2.", "conv2.norm.").replace(".conv.", ".")
            )
            state[theirs] = value
    file = {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    for config in ("mask_rcnn_r50", "mask_rcnn_r50_se"):
        target = ModelSpec.of(detector(config, "MODEL.RESNETS.STRIDE_IN_1X1", "True"))
        found, same = match(target, file), match(target, {"model": resnet.state_dict()})
        assert found.sources.keys() == same.sources.keys() and len(found.sources) == 265
        assert all(torch.equal(source.make(), same.sources[name].make()) for name, source in found.sources.items())
        assert found.unused == ["stem.fc.weight", "stem.fc.bias"] and not found.unexpected
        assert any("STRIDE_IN_1X1 False" in note for note in found.notes) == (config == "mask_rcnn_r50")


def test_another_mean_is_noted(resnet):
    found = match(
        ModelSpec.of(detector("mask_rcnn_r50", "MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]")), {"model": resnet.state_dict()}
    )
    assert any("PIXEL_MEAN" in note for note in found.notes)


def test_norms_without_statistics_leave_the_files_out(resnet):
    found = match(
        ModelSpec.of(detector("mask_rcnn_r50_se", "MODEL.HALONET.NORM", "GN")), {"model": resnet.state_dict()}
    )
    assert any("batch norm statistics" in note for note in found.notes) and not found.unexpected


def test_detectron2s_resnet_detector_in_the_hybrid(tmp_path):
    """Names of Detectron2: backbone, FPN and heads arrive; squeeze-excitation has no counterpart, and the stem stays as
    it is."""
    source, goal = detector("mask_rcnn_r50"), detector("mask_rcnn_r50_se")
    DetectionCheckpointer(source, str(tmp_path)).save("r50")
    checkpointer = Checkpointer(goal)
    checkpointer.load(str(tmp_path / "r50.pth"))
    report, after = checkpointer.report, goal.state_dict()
    assert report.share == 1.0 and 0.88 < report.backbone_share < 0.92 and report.match.whole
    for theirs, mine in {
        "stem.conv1.weight": "stem.conv1.conv.weight",
        "res4.5.conv2.weight": "res4.5.mixer.conv.weight",
        "res5.0.shortcut.norm.bias": "res5.0.shortcut.norm.bias",
        "res2.1.conv2.norm.running_var": "res2.1.norm2.running_var",
    }.items():
        assert torch.equal(after[f"backbone.bottom_up.{mine}"], source.state_dict()[f"backbone.bottom_up.{theirs}"])
    for name, value in source.state_dict().items():
        if not name.startswith("backbone.bottom_up."):
            assert torch.equal(after[name], value), name


def test_timms_se_resnet_fills_squeeze_excitation_too():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    source = timm.create_model("seresnet50")
    goal = detector("mask_rcnn_r50_se")
    found = match(ModelSpec.of(goal), {"model": source.state_dict()})
    fill = found.sources["backbone.bottom_up.res3.2.se.fc1.weight"].make()
    assert torch.equal(fill, source.state_dict()["layer2.2.se.fc1.weight"])
    assert not found.missing and not any("does not provide" in note for note in found.notes)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("R50-") and "SE" not in name])
def test_weights_fill_everything_but_the_operator(resnet, variant):
    with torch.device("meta"):
        model = HaloNet(variant)
    found = match(ModelSpec.of(model), {"model": resnet.state_dict()})
    filled = set(found.sources)
    left = {name for name, _ in model.named_parameters()} - filled
    # The norm after an operator belongs to it; external attention at the end of res5 is its block 3.
    operator = re.compile(r"res[45]\.\d\.(mixer|norm2)\.|res5\.3\.")
    assert left and all(operator.match(name) for name in left), left
    assert not found.unexpected and not found.mismatched
    theirs = resnet.state_dict()
    assert torch.equal(found.sources["res5.2.conv3.conv.weight"].make(), theirs["layer4.2.conv3.weight"])
    assert {"stem.conv1.conv.weight", "res3.3.mixer.conv.weight", "res5.0.shortcut.norm.running_var"} <= filled
