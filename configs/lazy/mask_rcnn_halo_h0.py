from detectron2 import model_zoo

from .common.data import dataloader
from .common.mask_rcnn_fpn import model
from .common.optim import SGD as optimizer
from .common.train import train

lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train.output_dir = "./output/lazy/mask_rcnn_halo_h0"
