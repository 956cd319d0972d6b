"""A tiny detector on 12 drawn images, with its trainer."""

import os
from pathlib import Path

from halodet.data import write_shapes
from halodet.engine import Trainer

import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.env import seed_all_rng
from helpers import cached_config

TRAIN, VAL = "tiny_shapes_train", "tiny_shapes_val"
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.HALONET.BASE_WIDTH": 16,
    "MODEL.HALONET.DEPTHS": "(1, 1, 1, 1)",
    "MODEL.HALONET.MIXERS": "('conv', 'halo', 'halo', 'halo')",
    "MODEL.HALONET.NORM": "BN",  # has running statistics
    "MODEL.FPN.OUT_CHANNELS": 32,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 48,
    "INPUT.RANDOM_FLIP": "none",
    "SOLVER.IMS_PER_BATCH": 2,
    "DATASETS.TRAIN": f"('{TRAIN}',)",
    "DATASETS.TEST": "()",
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "TEST.VIS_PERIOD": 0,
}
# Makes losses means over images without sampling: all anchors and proposals count.
DETERMINISTIC = {
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 10**5,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 10**5,
    "MODEL.RPN.NMS_THRESH": 1.0,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 10**4,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.RPN.LOSS_WEIGHT": 10.0,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 10.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 10**4,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "[[1.0]]",
}


def register_tiny_shapes():
    """Draw the images below the current folder unless they are there, and register them once in this process."""
    root = Path("datasets/tiny")
    for name, split, count in ((TRAIN, "train", 12), (VAL, "val", 2)):
        if not (root / f"annotations/{split}.json").exists():
            write_shapes(root, split, count)
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, f"{root}/annotations/{split}.json", f"{root}/{split}")


def make_config(folder, *options, config="quick/mask_rcnn_halo_shapes"):
    """The config of the tiny detector that writes to ``folder``; options are dicts of config keys."""
    keys = dict(TINY)
    for option in options:
        keys.update(option)
    cfg = cached_config(config, *(word for pair in keys.items() for word in pair))
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    cfg.freeze()
    return cfg


def make_trainer(folder, *options, seed=1, trainer=Trainer, config="quick/mask_rcnn_halo_shapes"):
    """A trainer of the tiny detector that writes to ``folder``; options are dicts of config keys."""
    register_tiny_shapes()
    os.makedirs(folder, exist_ok=True)
    seed_all_rng(seed)
    return trainer(make_config(folder, *options, config=config))


def losses(trainer):
    """Losses as name -> value at each iteration."""
    return {name: [v for v, _ in h.values()] for name, h in trainer.storage.histories().items() if "loss" in name}


def inject_nan(trainer, positions):
    """Make the first image of the batches at these positions NaN, counted from the first batch the trainer takes."""

    def batches(loader):
        for position, batch in enumerate(loader):
            if position in positions:
                batch[0]["image"] = torch.full_like(batch[0]["image"], float("nan"), dtype=torch.float32)
            yield batch

    trainer._trainer._data_loader_iter_obj = batches(trainer._trainer.data_loader)


def record_steps(trainer):
    """The list of iterations in which the optimizer makes a step, filled while training."""
    steps = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.iter))
    return steps


def all_finite(trainer):
    return all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())
