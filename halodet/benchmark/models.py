"""Backbones under a feature pyramid and whole Mask R-CNNs to compare: ours and Detectron2's, alike in everything but the backbone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from halodet.engine import load_config
from halodet.errors import ConfigError

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone, GeneralizedRCNN, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

KINDS = ("backbone", "detector")
MODES = ("forward", "training")
LEVELS = ["p2", "p3", "p4", "p5", "p6"]
OURS = ("mask_rcnn_halo_h4", "mask_rcnn_r50_se_halo_b8h3", "mask_rcnn_r50")
OBJECTS = 8  # in each image; COCO has 7.3
NORMS = {
    "BatchNorm2d": "BN",
    "SyncBatchNorm": "SyncBN",
    "FrozenBatchNorm2d": "FrozenBN",
    "LayerNorm": "LN",
    "GroupNorm": "GN",
}


@dataclass(frozen=True)
class Setting:
    """What all contenders are given: images in pixels, how many, and where and how they are computed."""

    height: int
    width: int
    batch: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of autocast
    channels_last: bool = False

    def __str__(self) -> str:
        layout = ", channels last" if self.channels_last else ""
        return f"{self.batch}×3×{self.height}×{self.width}, {str(self.dtype).removeprefix('torch.')}{layout}"


def _detectron2_config():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pkg_resources.*")
        from detectron2 import model_zoo
    return model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")


def _swin_t_fpn() -> Backbone:
    swin = SwinTransformer(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7)
    return FPN(swin, ["p0", "p1", "p2", "p3"], 256, top_block=LastLevelMaxPool())


def _vitdet_b() -> Backbone:
    vit = ViT(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        residual_block_indexes=[],
        use_rel_pos=True,
        out_feature="last_feat",
    )
    # not padded to a square, so that it sees images of the size the others see
    return SimpleFeaturePyramid(vit, "last_feat", 256, (4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool())


DETECTRON2: dict[str, Callable[[], Backbone]] = {
    "R50-FPN": lambda: build_backbone(_detectron2_config()),
    "Swin-T-FPN": _swin_t_fpn,
    "ViTDet-B": _vitdet_b,
}


def build_pyramid(name: str) -> Backbone:
    """A backbone with p2 … p6 and random weights: one of :data:`DETECTRON2`, or that of a halodet config.

    Raises:
        ConfigError: there is no such config, or it is not usable.
    """
    if name not in DETECTRON2:
        return build_backbone(load_config(name, ["MODEL.DEVICE", "cpu"]))
    with warnings.catch_warnings():
        # what Detectron2 imports from timm has moved, which is nothing a user could act on
        warnings.filterwarnings("ignore", message=".*timm.models.layers.*")
        return DETECTRON2[name]()


def check_config(name: str) -> None:
    """See, without building anything, that a config is usable and its backbone gives what the heads take.

    Raises:
        ConfigError: it is not.
    """
    with torch.device("meta"):
        levels = list(build_pyramid(name).output_shape())
    if levels != LEVELS:
        raise ConfigError(
            f"the backbone of {name} gives {', '.join(levels)}, and Mask R-CNN's heads take {', '.join(LEVELS)}"
        )


@functools.cache
def _noise(shape: tuple[int, ...], scale: float, device: torch.device) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


class _SteadyRPN(RPN):
    """Detectron2's RPN, which computes and trains its predictions but proposes from noise: as many boxes whatever the backbone."""

    def predict_proposals(self, anchors, logits, deltas, image_sizes):
        logits, deltas = (
            [_noise(tuple(x.shape), scale, x.device) for x in maps] for maps, scale in ((logits, 1.0), (deltas, 0.1))
        )
        return super().predict_proposals(anchors, logits, deltas, image_sizes)


class _SteadyOutputs(FastRCNNOutputLayers):
    """Detectron2's box predictor, whose detections come from noise: some thousand candidates, always the full number kept."""

    def inference(self, predictions, proposals):
        logits, deltas = (
            _noise(tuple(x.shape), scale, x.device) for x, scale in zip(predictions, (2.0, 0.1), strict=True)
        )
        return super().inference((logits, deltas), proposals)


def build_model(name: str, kind: str, setting: Setting) -> nn.Module:
    """A contender with random weights, on its device.

    Args:
        name: a backbone as for :func:`build_pyramid`.
        kind: ``"backbone"``, with its pyramid, or ``"detector"``: it with the heads of Detectron2's mask_rcnn_R_50_FPN_1x.
        setting: says device and memory format.

    Raises:
        ConfigError: as :func:`build_pyramid`.
    """
    torch.manual_seed(0)
    model = pyramid = build_pyramid(name)
    if kind == "detector":
        cfg, shapes = _detectron2_config(), pyramid.output_shape()
        outputs = _SteadyOutputs(cfg, ShapeSpec(channels=cfg.MODEL.ROI_BOX_HEAD.FC_DIM))
        model = GeneralizedRCNN(
            backbone=pyramid,
            proposal_generator=_SteadyRPN(cfg, shapes),
            roi_heads=StandardROIHeads(cfg, shapes, box_predictor=outputs),
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
    return model.to(
        setting.device, memory_format=torch.channels_last if setting.channels_last else torch.preserve_format
    )


def describe(model: nn.Module) -> dict:
    """Million parameters, how many of them are trained, and the names of its norms as Detectron2's configs have them."""
    norms = {NORMS[type(module).__name__] for module in model.modules() if type(module).__name__ in NORMS}
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6 for every in (True, False)
    )
    return {"parameters": total, "trained": trained, "norms": " ".join(sorted(norms))}


def make_inputs(kind: str, setting: Setting, channels: int = 256) -> object:
    """The same for every contender: for a backbone a batch (B, 3, H, W), padded as an FPN wants it, and a gradient for each level's
    ``channels``; for a detector Detectron2's list of dicts, images of bytes with :data:`OBJECTS` polygons each."""
    generator = torch.Generator().manual_seed(0)
    if kind == "backbone":
        height, width = (-(-side // 32) * 32 for side in (setting.height, setting.width))
        x = torch.randn(setting.batch, 3, height, width, generator=generator)
        shapes = [(setting.batch, channels, -(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]
        if setting.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(setting.device), [torch.randn(shape, generator=generator).to(setting.device) for shape in shapes]
    size = torch.tensor([setting.width, setting.height])
    angles = torch.arange(8) * torch.pi / 4
    octagon = torch.stack([angles.cos(), angles.sin()], 1) / 2
    inputs = []
    for _ in range(setting.batch):
        sides = size * (0.1 + 0.4 * torch.rand(OBJECTS, 2, generator=generator))
        centres = sides / 2 + (size - sides) * torch.rand(OBJECTS, 2, generator=generator)
        instances = Instances((setting.height, setting.width))
        instances.gt_boxes = Boxes(torch.cat([centres - sides / 2, centres + sides / 2], 1))
        instances.gt_classes = torch.randint(80, (OBJECTS,), generator=generator)
        polygons = centres.unsqueeze(1) + octagon * sides.unsqueeze(1)
        instances.gt_masks = PolygonMasks([[polygon.flatten().double().numpy()] for polygon in polygons])
        image = torch.randint(256, (3, setting.height, setting.width), dtype=torch.uint8, generator=generator)
        given = {"height": setting.height, "width": setting.width}
        inputs.append({"image": image.to(setting.device), "instances": instances.to(setting.device), **given})
    return inputs


def build_call(model: nn.Module, kind: str, mode: str, setting: Setting) -> Callable[[], object]:
    """A call without arguments that runs a model once on :func:`make_inputs`.

    Args:
        model: from :func:`build_model`; it is put into the mode that is asked for.
        kind: as it was built.
        mode: ``"forward"`` (inference, returns what the model returns) or ``"training"`` (forward, backward and a step of SGD).
        setting: the one it was built for.
    """
    model.train(mode == "training")
    pyramid = model.backbone if kind == "detector" else model
    inputs = make_inputs(kind, setting, pyramid.output_shape()["p2"].channels)
    if mode == "forward":
        return partial(_infer, model, inputs, setting)
    # with a learning rate of 0 a step costs what it always costs, and every round does the same work
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9, weight_decay=1e-4
    )
    for p in optimizer.param_groups[0]["params"]:  # held from the start, as after the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return partial(_train, model, inputs, optimizer, setting)


def build_model_call(name: str, kind: str, mode: str, setting: Setting) -> Callable[[], object]:
    """:func:`build_call` of a :func:`build_model`, for a process of its own."""
    return build_call(build_model(name, kind, setting), kind, mode, setting)


def _autocast(setting: Setting) -> torch.autocast:
    return torch.autocast(torch.device(setting.device).type, torch.bfloat16, enabled=setting.dtype != torch.float32)


@torch.no_grad()
def _infer(model: nn.Module, inputs, setting: Setting) -> object:
    with _autocast(setting):
        return model(inputs if isinstance(inputs, list) else inputs[0])


def _train(model: nn.Module, inputs, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    backward(model, inputs, setting)
    optimizer.step()
    optimizer.zero_grad()  # no contender holds gradients while another one runs


def backward(model: nn.Module, inputs, setting: Setting) -> dict[str, Tensor]:
    """Forward and backward of a model in training mode; returns the maps of a backbone, the losses of a detector."""
    if isinstance(inputs, list):
        with _autocast(setting), EventStorage():
            losses = model(inputs)
        sum(losses.values()).backward()
        return losses
    x, grads = inputs
    with _autocast(setting):
        maps = model(x)
    # random gradients, because behind a norm those of a mean or of a sum of squares vanish
    torch.autograd.backward(
        list(maps.values()), [grad.to(y.dtype) for y, grad in zip(maps.values(), grads, strict=True)]
    )
    return maps
