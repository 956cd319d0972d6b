from detectron2 import model_zoo

from .common.data import dataloader
from .common.mask_rcnn_fpn_timm import model
from .common.optim import AdamW as optimizer
from .common.train import train

dataloader.train.loader.mapper.image_format = model.input_format
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train.init_checkpoint = "timm://halonet26t.a1h_in1k"
train.output_dir = "./output/lazy/mask_rcnn_halonet26t"
