from .mask_rcnn_halonet26t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "sehalonet33ts.ra2_in1k"
train.init_checkpoint = "timm://sehalonet33ts.ra2_in1k"
train.output_dir = "./output/lazy/mask_rcnn_sehalonet33ts"
