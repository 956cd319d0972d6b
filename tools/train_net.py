#!/usr/bin/env python3
"""Train and evaluate a detector. Flags, logs and file layout are those of Detectron2's tools/train_net.py.

Several processes are started by --num-gpus, torchrun or Slurm. Exit code: 0 done, 2 a mistake in config, data or weights, 70 losses that
are not finite, 74 a checkpoint that cannot be written, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint, or before training
(go on with --resume), 76 another process of the run ended.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from datetime import timedelta
from functools import partial

from halodet.checkpoint import load_weights
from halodet.engine import (
    EXIT_RANK_LOST,
    DistEnv,
    Trainer,
    agree,
    check_shared,
    check_weights,
    check_writable,
    detect_dist_env,
    exit_on_preemption,
    find_config,
    handed_on,
    host_of,
    join,
    load_config,
    prepare_datasets,
    register_user_data,
    register_user_data_again,
    scale_to_batch,
    start_run,
    supervise,
    user_data_files,
    with_seed,
)
from halodet.errors import CheckpointError, ConfigError, DatasetError, TrainingStopped
from halodet.inference import CLASSES_FILE, ClassesError, read_classes, write_classes

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

EXIT_CODES = {
    ClassesError: 2,
    ConfigError: 2,
    DatasetError: 2,
    CheckpointError: 2,
    TrainingStopped: 1,
}  # of what one sentence tells all of
MISTAKES = tuple(EXIT_CODES)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = default_argument_parser()
    parser.description = __doc__
    parser.add_argument("--allow-pickle", action="store_true", help="read pickle files that may run code")
    minutes = (
        "how long processes wait for each other, when they start and whenever they exchange something (default: 30)"
    )
    parser.add_argument("--dist-timeout", type=float, default=30.0, metavar="MINUTES", help=minutes)
    own = parser.add_argument_group("your own COCO-format data, instead of the config's datasets")
    own.add_argument("--train-json", metavar="FILE", help="COCO json to train on; its classes become the model's")
    own.add_argument("--train-images", metavar="DIR", help="folder its file names are relative to")
    own.add_argument("--val-json", metavar="FILE", help="COCO json to evaluate on")
    own.add_argument("--val-images", metavar="DIR", help="folder its file names are relative to")
    return parser.parse_args(argv)


def setup(args: argparse.Namespace) -> CfgNode:
    """The run's config, with its data and weights checked: whatever can be wrong with a user's files is found here."""
    args.config_file = str(find_config(args.config_file))  # Detectron2 opens it once more to log it
    cfg = load_config(args.config_file, args.opts)
    check_writable(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, name="halodet", configure_stdout=False)
    cfg = cfg if args.eval_only else scale_to_batch(cfg)
    if args.train_json or args.val_json or args.train_images or args.val_images:
        cfg = register_user_data(cfg, args.train_json, args.train_images, args.val_json, args.val_images)
    weights = check_weights(cfg, eval_only=args.eval_only, resume=args.resume, allow_pickle=args.allow_pickle)
    prepare_datasets(cfg, train=not args.eval_only)
    if args.eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = weights
        cfg.freeze()
        check_classes(cfg)
    check_processes(cfg, args)
    return cfg


def check_machine(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What :func:`setup` found on the machine of rank 0 must be on each other one too; weights are fetched once for all its processes."""
    check_writable(cfg.OUTPUT_DIR)
    check_weights(cfg, eval_only=args.eval_only, resume=args.resume, allow_pickle=args.allow_pickle)
    prepare_datasets(cfg, train=not args.eval_only)


def check_classes(cfg: CfgNode) -> None:
    """Refuse to score a model on classes it was not trained on, or in another order of them."""
    if not os.path.isfile(os.path.join(os.path.dirname(cfg.MODEL.WEIGHTS), CLASSES_FILE)):
        return
    trained = [entry["name"] for entry in read_classes(cfg)]
    for name in cfg.DATASETS.TEST:
        classes = list(MetadataCatalog.get(name).thing_classes)
        if classes != trained:
            raise ConfigError(
                f"{cfg.MODEL.WEIGHTS} was trained on the classes {trained}, but dataset {name} has {classes}"
            )


def check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuse what Detectron2 would stop on once the processes are started."""
    processes = max(args.num_gpus * args.num_machines, comm.get_world_size())
    if args.num_gpus * args.num_machines > 1 and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} needs GPUs, but MODEL.DEVICE is cpu: "
            "set it to cuda, or start several processes on the CPU with torchrun"
        )
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % max(processes, 1):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, not a multiple of the {processes} processes: change one of them"
        )


def run(args: argparse.Namespace, cfg: CfgNode) -> dict | None:
    """Train or evaluate, in each process of the run."""
    if comm.get_world_size() > 1:
        tag = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
        check_shared([*user_data_files(cfg), *([tag] if args.resume else [])])
    register_user_data_again(cfg, args.train_images, args.val_images)
    agree(partial(check_machine, cfg, args), comm.get_local_rank() == 0 and comm.get_rank() > 0, MISTAKES)
    if not args.eval_only:
        cfg = with_seed(cfg, resume=args.resume, allow_pickle=args.allow_pickle)
    start_run(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        load_weights(model, cfg.MODEL.WEIGHTS, allow_pickle=args.allow_pickle)
        results = Trainer.test(cfg, model)
        return {**results, **Trainer.test_with_tta(cfg, model)} if cfg.TEST.AUG.ENABLED else results
    trainer = Trainer(cfg, allow_pickle=args.allow_pickle)
    if comm.is_main_process():
        save_classes(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def save_classes(cfg: CfgNode) -> None:
    """Write the classes the model learns beside its checkpoints, so that they can be named wherever these go."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(metadata.thing_classes))}
    classes = [{"id": dataset_id, "name": metadata.thing_classes[index]} for dataset_id, index in ids.items()]
    write_classes(os.path.join(cfg.OUTPUT_DIR, "classes.json"), classes)


def work_spawned(args: argparse.Namespace, cfg: CfgNode) -> None:
    """A process that Detectron2's launcher has started."""
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="halodet")
    with exit_on_preemption():
        code = supervise(partial(run, args, cfg), host_of(args.dist_url), EXIT_CODES)
    if code:
        sys.exit(code)


def work_joined(args: argparse.Namespace) -> None:
    """A process that torchrun or Slurm has started: the first one checks everything and writes, the others wait for it."""
    cfg = agree(partial(setup, args), comm.is_main_process(), MISTAKES)[0]
    if not comm.is_main_process():
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="halodet")
    run(args, cfg)


def join_and_work(args: argparse.Namespace, world: DistEnv) -> int:
    """Become one of torchrun's or Slurm's processes, and do its work; returns the exit code."""
    problem, device = "", "cpu"
    try:
        args.config_file = str(find_config(args.config_file))
        device = load_config(args.config_file, args.opts).MODEL.DEVICE
    except ConfigError as error:
        problem = str(error)
    join(world, device, timedelta(minutes=args.dist_timeout), problem=problem)
    return supervise(partial(work_joined, args), world.host, EXIT_CODES)


def spawn_and_work(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Have Detectron2 start a process for each GPU, and wait for them; returns the exit code."""
    timeout = timedelta(minutes=args.dist_timeout)
    try:
        with handed_on():
            launch(
                work_spawned, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args, cfg), timeout
            )
    except ProcessExitedException as error:
        if error.signal_name is None:
            return error.exit_code
        rank = args.machine_rank * args.num_gpus + error.error_index
        logging.getLogger("halodet").error(f"rank {rank} was ended by {error.signal_name}, and the others with it")
        return EXIT_RANK_LOST
    return 0


@exit_on_preemption()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    gpus, world, problem = torch.cuda.device_count(), None, None
    try:
        world = detect_dist_env(args)
    except ConfigError as error:
        problem = error
    setup_logger(distributed_rank=world.rank if world else 0, name="halodet")
    logger = logging.getLogger("halodet")
    logger.addHandler(logging.NullHandler())  # further processes say nothing until they have a file to say it in
    try:
        if problem:
            raise problem
        if world:
            return join_and_work(args, world)
        if args.num_gpus > max(gpus, 1):
            raise ConfigError(
                f"--num-gpus is {args.num_gpus} but PyTorch sees {gpus} here: give --num-gpus {max(gpus, 1)} or fewer"
            )
        cfg = setup(args)
        if args.num_gpus * args.num_machines > 1:
            return spawn_and_work(args, cfg)
        return supervise(partial(run, args, cfg), "", EXIT_CODES)
    except MISTAKES as error:
        logger.error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
