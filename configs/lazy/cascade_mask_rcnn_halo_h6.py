from .common.cascade_mask_rcnn_fpn import model
from .mask_rcnn_halo_h0 import dataloader, lr_multiplier, optimizer, train

model.backbone.bottom_up.variant = "H6"
train.output_dir = "./output/lazy/cascade_mask_rcnn_halo_h6"
