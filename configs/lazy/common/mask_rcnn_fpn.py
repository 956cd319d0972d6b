"""Mask R-CNN with FPN on a HaloNet, as configs/Base-RCNN-FPN.yaml: Detectron2's model with halodet's backbone."""

from halodet.backbones import HaloNetBackbone

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = L(HaloNetBackbone)(
    variant="H0", norm="SyncBN", out_features=["res2", "res3", "res4", "res5"]
)
model.backbone.norm = "SyncBN"
model.roi_heads.mask_head.conv_norm = "SyncBN"
model.pixel_std = [57.375, 57.120, 58.395]  # BGR, ImageNet
