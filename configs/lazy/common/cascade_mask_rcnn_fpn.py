"""Cascade Mask R-CNN with FPN on a HaloNet."""

from detectron2 import model_zoo

from .mask_rcnn_fpn import model as mask_rcnn

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
model.backbone = mask_rcnn.backbone
model.roi_heads.mask_head = mask_rcnn.roi_heads.mask_head
model.proposal_generator.post_nms_topk = (2000, 1000)
model.pixel_std = mask_rcnn.pixel_std
