from .mask_rcnn_halonet26t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "halonet50ts.a1h_in1k"
train.init_checkpoint = "timm://halonet50ts.a1h_in1k"
train.output_dir = "./output/lazy/mask_rcnn_halonet50ts"
