"""Functions that tests run in two processes; under torchrun also as ``two_ranks.py NAME ARGUMENTS``."""

import copy
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

from halodet.config import load_config
from halodet.data.bad_images import SKIPPED_KEY, Skipped, SkipTrackingLoader, TooManyBadImages
from halodet.engine import Trainer, main
from halodet.engine.bad_image_hook import BadImageHook
from halodet.engine.distributed import (
    broadcast_buffers,
    check_shared,
    convert_sync_batchnorm,
    create_exit_group,
    detect_dist_env,
    init_distributed,
    run_and_broadcast_errors,
    wait_for_all_ranks,
)
from halodet.engine.lazy import run_lazy_config
from halodet.engine.preemption import exit_on_preemption
from halodet.errors import ConfigError

import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase, create_ddp_model
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

SMALL = ["MODEL.HALONET.BASE_WIDTH", "16", "MODEL.DEVICE", "cpu"]
# All anchors and proposals contribute, none by chance, and each image has as many: losses are then divided by the same
# number in each process, and the mean of the processes' gradients must be the gradient of all images together.
NO_CHANCE = [
    "MODEL.HALONET.NORM", "GN", "MODEL.MASK_ON", "False", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000",
    "MODEL.RPN.NMS_THRESH", "1.0", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "24", "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "0",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5",
    "INPUT.MIN_SIZE_TRAIN", "(64,)",
]  # fmt: skip


def images(count):
    generator = torch.Generator().manual_seed(3)
    batch = []
    for _ in range(count):
        corner = torch.rand(3, 2, generator=generator) * 30
        boxes = torch.cat((corner, corner + 8 + torch.rand(3, 2, generator=generator) * 24), dim=1)
        objects = Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=torch.randint(6, (3,), generator=generator))
        image = torch.rand(3, 64, 64, generator=generator) * 255
        batch.append({"image": image, "instances": objects, "height": 64, "width": 64})
    return batch


def gradients(model):
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(one, other):
    """Largest difference of two gradients, over the largest value of their tensor."""
    assert one.keys() == other.keys() and len(one) > 20
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-12)) for n in one)


def parallel(model):
    return create_ddp_model(model, broadcast_buffers=False, device_ids=None)


def detector_gradient():
    """Faster R-CNN, two images a process, against one process with four; float32, as Detectron2's NMS needs."""
    torch.manual_seed(0)
    single = build_model(load_config("quick/mask_rcnn_halo_shapes", [*SMALL, *NO_CHANCE])).train()
    double = parallel(copy.deepcopy(single))
    batch = images(4)
    losses = single(copy.deepcopy(batch))
    sum(losses.values()).backward()
    sum(double(batch[2 * comm.get_rank() : 2 * comm.get_rank() + 2]).values()).backward()
    values = {name: float(loss) for name, loss in losses.items()}
    return {"gradient": difference(gradients(double), gradients(single)), "losses": values}


def backbone_gradient(norm="SyncBN", config="quick/mask_rcnn_halo_shapes", options=()):
    """Backbone and FPN with synchronized batch norm, two images a process, against plain batch norm over four."""
    key, *options = options or ("MODEL.HALONET.NORM",)
    both = []
    for kind in (norm, "BN"):
        torch.manual_seed(0)
        cfg = load_config(config, [*SMALL, *options, key, kind, "MODEL.FPN.NORM", kind])
        network = build_backbone(cfg).double().train()
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
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    means = [(a.running_mean - b.running_mean).abs().max() for a, b in zip(naive, norms, strict=True)]
    gradient = difference(gradients(double), gradients(plain))
    return {"gradient": gradient, "naive": len(naive), "running_mean": float(max(means))}


def timm_gradient():
    options = ("MODEL.HALODET_TIMM.NORM", "MODEL.HALODET_TIMM.OUT_FEATURES", "('res2','res3','res4','res5')")
    return backbone_gradient(config="mask_rcnn_eca_halonext26ts", options=options)


def buffers():
    norm = nn.BatchNorm2d(3)
    norm.running_mean += 1.0 + comm.get_rank()
    broadcast_buffers(norm)
    return float(norm.running_mean[0])


def errors(folder):
    """What both ranks get of one rank's result, of its error, and of a file that only one rank has."""
    found = {"values": run_and_broadcast_errors(lambda: "checked", comm.get_rank() == 0)}

    def fail():
        raise ConfigError("set it to 3")

    (folder / f"own{comm.get_rank()}").write_text("text")
    own = folder / f"own{comm.get_rank()}"
    check_shared([folder / "own0", folder / "nowhere"])
    for name, call in (("error", lambda: run_and_broadcast_errors(fail, comm.get_rank() == 1)),
                       ("shared", lambda: check_shared([own], wait_seconds=0))):  # fmt: skip
        try:
            call()
        except ConfigError as error:
            found[name] = str(error)
    return found


def waiting():
    """Whether all ranks come: together, and without rank 1."""
    create_exit_group()
    return [wait_for_all_ranks(20.0), comm.get_rank() == 0 and wait_for_all_ranks(0.5)]


def measure(folder, timm):
    env = detect_dist_env()
    init_distributed(env, timedelta(minutes=2))
    found = {"env": [env.rank, comm.get_local_rank(), comm.get_local_size()]}
    folder = Path(folder)
    parts = {"detector": detector_gradient, "backbone": backbone_gradient, "buffers": buffers}
    parts |= {"errors": lambda: errors(folder), **({"timm": timm_gradient} if timm == "timm" else {})}
    for name, part in parts.items():
        with EventStorage():
            found[name] = part()
    cfg = load_config("quick/mask_rcnn_halo_shapes", [*SMALL, "MODEL.HALONET.NORM", "SyncBN"])
    names = {type(module).__name__ for module in Trainer.build_model(cfg).modules()}
    found["norms"] = sorted(name for name in names if "BatchNorm" in name)
    found["waiting"] = waiting()
    (folder / f"found{comm.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def train(*arguments):
    """Train as tools/train_net.py does; returns its exit code."""
    return main.main(main.argument_parser("").parse_args(list(arguments)))


def train_killed(iteration, *arguments):
    """Train; on torchrun's first attempt rank 1 gets SIGKILL before ``iteration``."""
    run_step = Trainer.run_step

    def run_step_or_die(self):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and comm.get_rank() == 1 and self.iter == int(iteration):
            os.kill(os.getpid(), signal.SIGKILL)
        run_step(self)

    Trainer.run_step = run_step_or_die
    sys.exit(train(*arguments))


def train_spawned(*arguments):
    """Train with two processes as ``--num-gpus 2`` starts them, but on the CPU."""
    args = main.argument_parser("").parse_args(list(arguments))
    args.num_gpus, args.dist_url = 2, "auto"
    return main.launch_ranks(args, timedelta(minutes=5), main.run_config)


def train_lazy(*arguments):
    """Train a LazyConfig on the tiny shapes."""
    from small_run import register_tiny_shapes  # not on the path of torchrun's processes

    register_tiny_shapes()
    return main.main(main.argument_parser("").parse_args(list(arguments)), run_lazy_config)


def leave(number):
    """Get a signal outside of training."""
    with exit_on_preemption():
        os.kill(os.getpid(), number)
    print("late")


class _Loop(TrainerBase):
    def __init__(self, loader):
        super().__init__()
        self._batches = iter(loader)

    def run_step(self):
        next(self._batches)


def _batches():
    """Batches of two images; on rank 1 the first of them is a bad file."""
    for number in range(1000):
        yield [{SKIPPED_KEY: [Skipped(f"{number % 3}.jpg", "does not exist")]} if comm.get_rank() else {}, {}]


def count_bad_images(folder, max_share):
    """Run 50 iterations with a bad file in each on rank 1; print when the run stops."""
    init_distributed(detect_dist_env(), timedelta(minutes=2))
    loader = SkipTrackingLoader(_batches())
    loop = _Loop(loader)
    loop.register_hooks([BadImageHook(loader, folder, max_share=max_share, checkpoint_period=100)])
    try:
        loop.train(0, 50)
    except TooManyBadImages as error:
        print(f"rank {comm.get_rank()} stops after {loop.iter + 1}: {error}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
