from .mask_rcnn_halo_h0 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.variant = "R50-plg"
train.output_dir = "./output/lazy/mask_rcnn_r50_plg"
