"""What tools/lazyconfig_train_net.py needs besides model, data and optimizer: Detectron2's keys, and halodet's."""

from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.eval_period = 10000
train.seed = -1  # a random one
train.min_loaded = 0.95  # fraction of what init_checkpoint is expected to load
train.grad_accum_steps = 1
train.nan_guard = dict(policy="stop", max_steps=3)  # of non-finite losses and gradients: stop or skip
train.max_bad_images = 0.05  # fraction of the images
train.ema = dict(enabled=False, decay=0.9999)
