from .mask_rcnn_halonet26t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "halo2botnet50ts_256.a1h_in1k"
train.init_checkpoint = "timm://halo2botnet50ts_256.a1h_in1k"
train.output_dir = "./output/lazy/mask_rcnn_halo2botnet50ts"
