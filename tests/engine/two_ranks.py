"""What test_distributed.py has torchrun start in two processes: each writes what it measured, for the tests to judge."""

import argparse
import copy
import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

from halodet.engine import Trainer, agree, check_shared, detect_dist_env, join, load_config
from halodet.engine.distributed import broadcast_buffers, convert_sync_batchnorm, ddp_anywhere
from halodet.errors import ConfigError

import torch
import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

SMALL = ["MODEL.HALONET.BASE_WIDTH", "16", "MODEL.DEVICE", "cpu"]
# All anchors and proposals are learned from, none by chance, and each image has as many: what a loss is divided by is then the same number
# for each process, and the mean of the processes' gradients must be the gradient of all images together.
NO_CHANCE = [
    "MODEL.HALONET.NORM", "GN", "MODEL.MASK_ON", "False", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.NMS_THRESH", "1.0",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "24", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "0", "INPUT.MIN_SIZE_TRAIN", "(64,)",
]  # fmt: skip


def images(count):
    generator = torch.Generator().manual_seed(3)
    batch = []
    for _ in range(count):
        corner = torch.rand(3, 2, generator=generator) * 30
        boxes = torch.cat((corner, corner + 8 + torch.rand(3, 2, generator=generator) * 24), dim=1)
        objects = Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=torch.randint(6, (3,), generator=generator))
        batch.append(
            {"image": torch.rand(3, 64, 64, generator=generator) * 255, "instances": objects, "height": 64, "width": 64}
        )
    return batch


def gradients(model):
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(one, other):
    """Largest difference of two gradients, over the largest value of their tensor."""
    assert one.keys() == other.keys() and len(one) > 20
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-12)) for n in one)


def parallel(model):
    with ddp_anywhere():
        return defaults.create_ddp_model(model, broadcast_buffers=False)


def detector_gradient():
    """Faster R-CNN, two images a process, against one process with four; in single precision, as Detectron2's NMS takes no other."""
    torch.manual_seed(0)
    single = build_model(load_config("quick/mask_rcnn_halo_shapes", [*SMALL, *NO_CHANCE])).train()
    double = parallel(copy.deepcopy(single))
    batch = images(4)
    losses = single(copy.deepcopy(batch))
    sum(losses.values()).backward()
    sum(double(batch[2 * comm.get_rank() : 2 * comm.get_rank() + 2]).values()).backward()
    return {
        "gradient": difference(gradients(double), gradients(single)),
        "losses": {name: float(loss) for name, loss in losses.items()},
    }


def backbone_gradient(norm="SyncBN", config="quick/mask_rcnn_halo_shapes", options=()):
    """Backbone and FPN with synchronised batch norm, two images a process, against plain batch norm over four."""
    key, *options = options or ("MODEL.HALONET.NORM",)
    both = []
    for kind in (norm, "BN"):
        torch.manual_seed(0)
        network = (
            build_backbone(load_config(config, [*SMALL, *options, key, kind, "MODEL.FPN.NORM", kind])).double().train()
        )
        both.append(convert_sync_batchnorm(network) if kind == norm else network)
    synced, plain = both
    plain.load_state_dict(synced.state_dict())
    naive = [module for module in synced.modules() if isinstance(module, NaiveSyncBatchNorm)]
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
    torch.manual_seed(1)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    weights = {}

    def loss(maps, part):
        total = 0.0
        for name, value in maps.items():
            torch.manual_seed(5)
            weights.setdefault(name, torch.randn(4, *value.shape[1:], dtype=torch.float64))
            total = total + (value * weights[name][part]).sum() / len(value)
        return total

    loss(plain(x), slice(0, 4)).backward()
    mine = slice(2 * comm.get_rank(), 2 * comm.get_rank() + 2)
    double = parallel(synced)
    loss(double(x[mine]), mine).backward()
    means = [(a.running_mean - b.running_mean).abs().max() for a, b in zip(naive, bns(plain), strict=True)]
    return {
        "gradient": difference(gradients(double), gradients(plain)),
        "naive": len(naive),
        "running_mean": float(max(means)),
    }


def bns(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def timm_gradient():
    return backbone_gradient(
        config="mask_rcnn_eca_halonext26ts",
        options=("MODEL.TIMM.NORM", "MODEL.TIMM.OUT_FEATURES", "('res2','res3','res4','res5')"),
    )


def buffers():
    norm = nn.BatchNorm2d(3)
    norm.running_mean += 1.0 + comm.get_rank()
    broadcast_buffers(norm)
    return {"mean": float(norm.running_mean[0])}


def agreement(folder):
    value = agree(lambda: "checked", comm.get_rank() == 0, (ConfigError,))
    found = {"values": value}
    try:
        agree(refuse, comm.get_rank() == 1, (ConfigError,))
    except ConfigError as error:
        found["refused"] = str(error)
    (folder / f"own{comm.get_rank()}").write_text("text")
    check_shared([folder / "own0", folder / "nowhere"])
    return found


def refuse():
    raise ConfigError("set it to 3")


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = detect_dist_env(argparse.Namespace(num_gpus=1, num_machines=1, machine_rank=0))
    join(world, "cpu", timedelta(minutes=2))
    parts = [detector_gradient, backbone_gradient, buffers, partial(agreement, folder)]
    found = {"rank": comm.get_rank(), "local_rank": comm.get_local_rank(), "local_size": comm.get_local_size()}
    for name, part in zip(("detector", "backbone", "buffers", "agreement"), parts, strict=True):
        with EventStorage():
            found[name] = part()
    if "timm" in sys.argv:
        found["timm"] = timm_gradient()
    cfg = load_config("quick/mask_rcnn_halo_shapes", [*SMALL, "MODEL.HALONET.NORM", "SyncBN"])
    found["trainer_norms"] = sorted(
        {type(m).__name__ for m in Trainer.build_model(cfg).modules() if "BatchNorm" in type(m).__name__}
    )
    (folder / f"found{comm.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
