from .mask_rcnn_halonet26t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "haloregnetz_b.ra3_in1k"
model.pixel_mean = model.pixel_std = [127.5, 127.5, 127.5]
train.init_checkpoint = "timm://haloregnetz_b.ra3_in1k"
train.output_dir = "./output/lazy/mask_rcnn_haloregnetz_b"
