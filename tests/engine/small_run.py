"""A small detector on drawn shapes, with its trainer."""

import os

from halodet.engine import Trainer, load_config, prepare_datasets

import torch
from detectron2.utils.env import seed_all_rng

TINY = {
    "MODEL.HALONET.BASE_WIDTH": 16,
    "MODEL.HALONET.DEPTHS": "(1, 1, 1, 1)",
    "MODEL.HALONET.MIXERS": "('conv', 'halo', 'halo', 'halo')",
    "MODEL.HALONET.NORM": "BN",  # whose statistics are to be looked after
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.RANDOM_FLIP": "none",
    "SOLVER.IMS_PER_BATCH": 2,
    "DATASETS.TEST": "()",
}
# Losses that are means over images, without chance: every anchor and every proposal counts.
NO_CHANCE = {
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


def make_trainer(folder, *options, seed=1, **keys):
    """A trainer of the quick config on shapes that writes to ``folder``; options are dicts of config keys."""
    opts = dict(TINY)
    for more in options:
        opts.update(more)
    os.makedirs(folder, exist_ok=True)
    cfg = load_config(
        "quick/mask_rcnn_halo_shapes", [str(word) for pair in {**opts, "OUTPUT_DIR": folder}.items() for word in pair]
    )
    prepare_datasets(cfg)
    seed_all_rng(seed)
    return Trainer(cfg)


def losses(trainer):
    """Name -> its value at each iteration."""
    return {name: [v for v, _ in h.values()] for name, h in trainer.storage.histories().items() if "loss" in name}


def spoil(trainer, positions):
    """Make the first image of the batches at these positions NaN, counted from the first batch the trainer takes."""

    def batches(loader):
        for position, batch in enumerate(loader):
            if position in positions:
                batch[0]["image"] = torch.full_like(batch[0]["image"], float("nan"), dtype=torch.float32)
            yield batch

    trainer._trainer._data_loader_iter_obj = batches(trainer._trainer.data_loader)
