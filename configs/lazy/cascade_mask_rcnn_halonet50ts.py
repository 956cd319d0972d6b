from .common.cascade_mask_rcnn_fpn import model
from .mask_rcnn_halonet50ts import dataloader, lr_multiplier, optimizer, train
from .mask_rcnn_halonet50ts import model as _mask_rcnn

model.backbone = _mask_rcnn.backbone
model.roi_heads.mask_head = _mask_rcnn.roi_heads.mask_head
model.update(pixel_mean=_mask_rcnn.pixel_mean, pixel_std=_mask_rcnn.pixel_std, input_format=_mask_rcnn.input_format)
train.output_dir = "./output/lazy/cascade_mask_rcnn_halonet50ts"
