"""Backbones with FPN and Mask R-CNNs to compare: halodet's and Detectron2's, identical except for the backbone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from halodet.config import load_config
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
OBJECTS = 8  # per image; COCO has 7.3
NORMS = {
    "BatchNorm2d": "BN",
    "SyncBatchNorm": "SyncBN",
    "FrozenBatchNorm2d": "FrozenBN",
    "LayerNorm": "LN",
    "GroupNorm": "GN",
}


@dataclass(frozen=True)
class Case:
    """Image size in pixels, batch size, device and autocast dtype of a comparison."""

    height: int
    width: int
    batch: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __str__(self) -> str:
        memory_format = ", channels last" if self.channels_last else ""
        return f"{self.batch}×3×{self.height}×{self.width}, {str(self.dtype).removeprefix('torch.')}{memory_format}"


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
    # Not padded to a square, so that all models get the same image size.
    return SimpleFeaturePyramid(vit, "last_feat", 256, (4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool())


DETECTRON2: dict[str, Callable[[], Backbone]] = {
    "R50-FPN": lambda: build_backbone(_detectron2_config()),
    "Swin-T-FPN": _swin_t_fpn,
    "ViTDet-B": _vitdet_b,
}


def build_pyramid(name: str) -> Backbone:
    """Build a backbone with p2 ... p6 and random weights: a key of :data:`DETECTRON2`, or a halodet config.

    Raises:
        ConfigError: the config does not exist or is invalid.
    """
    if name not in DETECTRON2:
        return build_backbone(load_config(name, ["MODEL.DEVICE", "cpu"]))
    with warnings.catch_warnings():
        # Detectron2 imports from a deprecated timm module.
        warnings.filterwarnings("ignore", message=".*timm.models.layers.*")
        return DETECTRON2[name]()


def check_config(name: str) -> None:
    """Check, on the meta device, that the backbone of a config has the levels that the heads need.

    Raises:
        ConfigError: it does not, or the config is invalid.
    """
    with torch.device("meta"):
        levels = list(build_pyramid(name).output_shape())
    if levels != LEVELS:
        raise ConfigError(f"--config-file={name} has backbone outputs {levels}, expected {LEVELS} for Mask R-CNN")


@functools.cache
def _noise(shape: tuple[int, ...], scale: float, device: torch.device) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


class _FixedRPN(RPN):
    """RPN that computes and trains its predictions but proposes from fixed noise: equal work for every backbone."""

    def predict_proposals(self, anchors, logits, deltas, image_sizes):
        logits = [_noise(tuple(x.shape), 1.0, x.device) for x in logits]
        deltas = [_noise(tuple(x.shape), 0.1, x.device) for x in deltas]
        return super().predict_proposals(anchors, logits, deltas, image_sizes)


class _FixedOutputs(FastRCNNOutputLayers):
    """Box predictor with detections from fixed noise: enough candidates to always keep the maximum number."""

    def inference(self, predictions, proposals):
        scales = (2.0, 0.1)
        noise = tuple(_noise(tuple(x.shape), scale, x.device) for x, scale in zip(predictions, scales, strict=True))
        return super().inference(noise, proposals)


def build_model(name: str, kind: str, case: Case) -> nn.Module:
    """Build a model with random weights on its device.

    Args:
        name: backbone, see :func:`build_pyramid`.
        kind: ``"backbone"`` (with FPN), or ``"detector"``: with the heads of Detectron2's mask_rcnn_R_50_FPN_1x.
        case: device and memory format.

    Raises:
        ConfigError: see :func:`build_pyramid`.
    """
    torch.manual_seed(0)
    model = pyramid = build_pyramid(name)
    if kind == "detector":
        cfg, shapes = _detectron2_config(), pyramid.output_shape()
        outputs = _FixedOutputs(cfg, ShapeSpec(channels=cfg.MODEL.ROI_BOX_HEAD.FC_DIM))
        model = GeneralizedRCNN(
            backbone=pyramid,
            proposal_generator=_FixedRPN(cfg, shapes),
            roi_heads=StandardROIHeads(cfg, shapes, box_predictor=outputs),
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        )
    return model.to(case.device, memory_format=torch.channels_last if case.channels_last else torch.preserve_format)


def describe(model: nn.Module) -> dict:
    """Return parameters and trained parameters in millions, and the norm types as named in Detectron2's configs."""
    norms = {NORMS[type(module).__name__] for module in model.modules() if type(module).__name__ in NORMS}
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6 for every in (True, False)
    )
    return {"parameters": total, "trained": trained, "norms": " ".join(sorted(norms))}


def make_inputs(kind: str, case: Case, channels: int = 256) -> object:
    """Make the inputs, identical for every model.

    Returns:
        For a backbone a batch (B, 3, H, W), padded to a multiple of 32 pixels, and an output gradient per level of
        ``channels`` channels; for a detector Detectron2's list of dicts, uint8 images with :data:`OBJECTS` polygons.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "backbone":
        height, width = (-(-side // 32) * 32 for side in (case.height, case.width))
        x = torch.randn(case.batch, 3, height, width, generator=generator)
        shapes = [(case.batch, channels, -(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]
        if case.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(case.device), [torch.randn(shape, generator=generator).to(case.device) for shape in shapes]
    size = torch.tensor([case.width, case.height])
    angles = torch.arange(8) * torch.pi / 4
    octagon = torch.stack([angles.cos(), angles.sin()], 1) / 2
    inputs = []
    for _ in range(case.batch):
        sides = size * (0.1 + 0.4 * torch.rand(OBJECTS, 2, generator=generator))
        centers = sides / 2 + (size - sides) * torch.rand(OBJECTS, 2, generator=generator)
        instances = Instances((case.height, case.width))
        instances.gt_boxes = Boxes(torch.cat([centers - sides / 2, centers + sides / 2], 1))
        instances.gt_classes = torch.randint(80, (OBJECTS,), generator=generator)
        polygons = centers.unsqueeze(1) + octagon * sides.unsqueeze(1)
        instances.gt_masks = PolygonMasks([[polygon.flatten().double().numpy()] for polygon in polygons])
        image = torch.randint(256, (3, case.height, case.width), dtype=torch.uint8, generator=generator)
        given = {"height": case.height, "width": case.width}
        inputs.append({"image": image.to(case.device), "instances": instances.to(case.device), **given})
    return inputs


def build_call(model: nn.Module, kind: str, mode: str, case: Case) -> Callable[[], object]:
    """Return a call that runs a model once on :func:`make_inputs`.

    Args:
        model: from :func:`build_model`.
        kind: the kind it was built with.
        mode: ``"forward"`` (inference) or ``"training"`` (forward, backward and a step of SGD).
        case: the case it was built for.
    """
    model.train(mode == "training")
    pyramid = model.backbone if kind == "detector" else model
    inputs = make_inputs(kind, case, pyramid.output_shape()["p2"].channels)
    if mode == "forward":
        return partial(_infer, model, inputs, case)
    # A learning rate of 0 costs the same and keeps every round identical.
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9, weight_decay=1e-4
    )
    for p in optimizer.param_groups[0]["params"]:  # allocated from the start, as after the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return partial(_train, model, inputs, optimizer, case)


def build_model_call(name: str, kind: str, mode: str, case: Case) -> Callable[[], object]:
    """Build a model and its call; picklable arguments only, see :func:`~halodet.benchmark.peak_memory.peak_memory`."""
    return build_call(build_model(name, kind, case), kind, mode, case)


def _autocast(case: Case) -> torch.autocast:
    return torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=case.dtype != torch.float32)


@torch.no_grad()
def _infer(model: nn.Module, inputs, case: Case) -> object:
    with _autocast(case):
        return model(inputs if isinstance(inputs, list) else inputs[0])


def _train(model: nn.Module, inputs, optimizer: torch.optim.Optimizer, case: Case) -> None:
    backward(model, inputs, case)
    optimizer.step()
    optimizer.zero_grad()  # do not hold gradients while other models run


def backward(model: nn.Module, inputs, case: Case) -> dict[str, Tensor]:
    """Run forward and backward in training mode; return the maps of a backbone or the losses of a detector."""
    if isinstance(inputs, list):
        with _autocast(case), EventStorage():
            losses = model(inputs)
        sum(losses.values()).backward()
        return losses
    x, grads = inputs
    with _autocast(case):
        maps = model(x)
    # Random gradients: those of a mean or a sum of squares vanish behind a norm.
    torch.autograd.backward(
        list(maps.values()), [grad.to(y.dtype) for y, grad in zip(maps.values(), grads, strict=True)]
    )
    return maps
