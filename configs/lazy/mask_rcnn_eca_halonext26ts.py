from .mask_rcnn_halonet26t import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "eca_halonext26ts.c1_in1k"
train.init_checkpoint = "timm://eca_halonext26ts.c1_in1k"
train.output_dir = "./output/lazy/mask_rcnn_eca_halonext26ts"
