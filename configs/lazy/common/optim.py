"""SGD and AdamW with halodet's parameter groups."""

from halodet.solver import get_optimizer_params

import torch
from detectron2.config import LazyCall as L

SGD = L(torch.optim.SGD)(
    params=L(get_optimizer_params)(base_lr="${..lr}", weight_decay="${..weight_decay}"),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

AdamW = L(torch.optim.AdamW)(
    params=L(get_optimizer_params)(
        base_lr="${..lr}", weight_decay="${..weight_decay}", backbone_lr_multiplier=0.5, lr_layer_decay=1.0
    ),
    lr=2e-4,
    weight_decay=0.05,
)
