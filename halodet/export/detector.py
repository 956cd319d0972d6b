"""Detectron2's detectors and backbones as functions of one tensor, which is what can be exported."""

from __future__ import annotations

from halodet.errors import HalodetError

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn


class ExportError(HalodetError, ValueError):
    """A model, format or option cannot be exported."""


class ExportableDetector(nn.Module):
    """A detector as a function of one image, without its postprocessing.

    The forward pass maps an image (3, H, W), float32 from 0 to 255 in the model's channel order and of test size, to
    the tensors named in ``outputs``:

    * ``boxes`` (N, 4): x1, y1, x2, y2 in pixels of the image;
    * ``scores`` (N,), ``classes`` (N,);
    * ``masks`` (N, M, M): probabilities on a grid over the box;
    * ``sem_seg`` (C, h, w): logits of the padded image at stride ``sem_seg_stride``.

    Normalization and padding are part of it. There is one image, because the number of images is a constant of
    Detectron2's heads.

    Args:
        model: GeneralizedRCNN, PanopticFPN, or a dense detector such as RetinaNet.

    Raises:
        ExportError: a model of another kind, or one with keypoints or without proposals of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        name = type(model).__name__
        if not isinstance(model, GeneralizedRCNN | DenseDetector):
            raise ExportError(f"{name} cannot be exported: expected GeneralizedRCNN, PanopticFPN or a dense detector.")
        heads = getattr(model, "roi_heads", None)
        if getattr(heads, "keypoint_on", False):
            raise ExportError(f"{name} cannot be exported with keypoints. Fix: set MODEL.KEYPOINT_ON False.")
        if isinstance(model, GeneralizedRCNN) and model.proposal_generator is None:
            raise ExportError(f"{name} cannot be exported without a proposal generator: it reads proposals of a file.")
        head = getattr(model, "sem_seg_head", None)
        if head is not None and not isinstance(head, SemSegFPNHead):
            raise ExportError(f"{type(head).__name__} cannot be exported: expected a SemSegFPNHead.")
        self.model = model
        self.outputs = ["boxes", "scores", "classes"]
        self.outputs += ["masks"] * getattr(heads, "mask_on", False) + ["sem_seg"] * (head is not None)
        self.sem_seg_stride = head.common_stride if head is not None else None
        self.eval()  # exporters restore the mode of the outermost module

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        images = self.model.preprocess_image([{"image": image}])
        features = self.model.backbone(images.tensor)
        if isinstance(self.model, DenseDetector):
            maps = [features[name] for name in self.model.head_in_features]
            (found,) = self.model.forward_inference(images, maps, self.model.head(maps))
            return found.pred_boxes.tensor, found.scores, found.pred_classes
        proposals, _ = self.model.proposal_generator(images, features, None)
        outputs = self._roi_outputs(images, features, proposals)
        if "sem_seg" in self.outputs:
            outputs.append(self.model.sem_seg_head.layers(features)[0])
        return tuple(outputs)

    def _roi_outputs(self, images: ImageList, features: dict[str, Tensor], proposals: list[Instances]) -> list[Tensor]:
        heads = self.model.roi_heads
        if "masks" not in self.outputs:
            (found,), _ = heads(images, features, proposals, None)
            return [found.pred_boxes.tensor, found.scores, found.pred_classes]
        heads.mask_on = False
        try:
            (found,), _ = heads(images, features, proposals, None)
        finally:
            heads.mask_on = True
        boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
        # With one box more, because runtimes cannot normalize groups of no box.
        padded = Instances(found.image_size)
        padded.pred_boxes = Boxes(torch.cat((boxes, boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]]))))
        padded.pred_classes = torch.cat((classes, classes.new_zeros(1)))
        (masked,) = heads.forward_with_given_boxes(features, [padded])
        return [boxes, scores, classes, masked.pred_masks[:-1, 0]]


class ExportableBackbone(nn.Module):
    """A backbone as a function of normalized images (B, 3, H, W) that returns a tuple of its feature maps.

    Images are padded to multiples of the size divisibility, so maps are those of the padded images.

    Args:
        backbone: backbone of Detectron2.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.outputs = list(backbone.output_shape())
        self.divisor = max(backbone.size_divisibility, 1)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.divisor > 1:
            height, width = images.shape[-2:]
            bottom, right = -height % self.divisor, -width % self.divisor
            images = nn.functional.pad(images, [0, right, 0, bottom])
        features = self.backbone(images)
        return tuple(features[name] for name in self.outputs)
