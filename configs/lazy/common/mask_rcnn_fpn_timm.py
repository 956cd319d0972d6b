"""Mask R-CNN with FPN on a timm network with ImageNet weights, as configs/Base-RCNN-FPN-timm.yaml."""

from halodet.backbones import TimmBackbone

from detectron2.config import LazyCall as L

from .mask_rcnn_fpn import model

model.backbone.bottom_up = L(TimmBackbone)(
    name="halonet26t.a1h_in1k", norm="FrozenBN", out_features=["res2", "res3", "res4", "res5"]
)
model.backbone.norm = model.roi_heads.mask_head.conv_norm = ""
model.pixel_mean = [123.675, 116.28, 103.53]  # RGB, those of timm's weights
model.pixel_std = [58.395, 57.12, 57.375]
model.input_format = "RGB"
