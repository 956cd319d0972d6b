#!/usr/bin/env python3
"""Train and evaluate a detector. Flags, logs and file layout are those of Detectron2's tools/train_net.py."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from halodet.data import DatasetError
from halodet.engine import (
    ConfigError,
    Trainer,
    check_weights,
    check_writable,
    find_config,
    load_config,
    prepare_datasets,
    register_user_data,
    register_user_data_again,
    with_seed,
)
from halodet.inference import CLASSES_FILE, ClassesError, read_classes, write_classes
from halodet.weights import WeightsError, load_weights

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = default_argument_parser()
    parser.description = __doc__
    parser.add_argument("--trust-pickle", action="store_true", help="read pickle files that may run code")
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
    if args.train_json or args.val_json or args.train_images or args.val_images:
        cfg = register_user_data(cfg, args.train_json, args.train_images, args.val_json, args.val_images)
    weights = check_weights(cfg, eval_only=args.eval_only, resume=args.resume, trust_pickle=args.trust_pickle)
    prepare_datasets(cfg, train=not args.eval_only)
    if args.eval_only:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = weights
        cfg.freeze()
        check_classes(cfg)
    check_processes(cfg, args)
    return cfg


def check_classes(cfg: CfgNode) -> None:
    """Refuse to score a model on classes it was not trained on, or in another order of them."""
    if not os.path.isfile(os.path.join(os.path.dirname(cfg.MODEL.WEIGHTS), CLASSES_FILE)):
        return
    trained = [entry["name"] for entry in read_classes(cfg)]
    for name in cfg.DATASETS.TEST:
        classes = list(MetadataCatalog.get(name).thing_classes)
        if classes != trained:
            raise ConfigError(f"{cfg.MODEL.WEIGHTS} was trained on the classes {trained}, but dataset {name} has {classes}")


def check_processes(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuse what Detectron2 would stop on once the processes are started."""
    processes = args.num_gpus * args.num_machines
    if processes > 1 and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError(f"--num-gpus {args.num_gpus} needs GPUs, but MODEL.DEVICE is cpu: set it to cuda")
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % max(processes, 1):
        raise ConfigError(f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, not a multiple of the {processes} GPUs: change one of them")


def run(args: argparse.Namespace, cfg: CfgNode) -> dict | None:
    """Train or evaluate, in each process of the run."""
    register_user_data_again(cfg, args.train_images, args.val_images)
    if not logging.getLogger("halodet").handlers:  # a process started for a further GPU
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="halodet")
    if not args.eval_only:
        cfg = with_seed(cfg, resume=args.resume, trust_pickle=args.trust_pickle)
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        load_weights(model, cfg.MODEL.WEIGHTS, trust_pickle=args.trust_pickle)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg, trust_pickle=args.trust_pickle)
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


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setup_logger(name="halodet")
    gpus = torch.cuda.device_count()
    try:
        if args.num_gpus > max(gpus, 1):
            raise ConfigError(f"--num-gpus is {args.num_gpus} but PyTorch sees {gpus} here: give --num-gpus {max(gpus, 1)} or fewer")
        cfg = setup(args)
        launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, cfg),
        )
    except (ClassesError, ConfigError, DatasetError, WeightsError) as error:
        logging.getLogger("halodet").error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
