from .mask_rcnn_halo_h0 import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.variant = "R101-SE-halo-b8h3"
train.output_dir = "./output/lazy/mask_rcnn_r101_se_halo_b8h3"
