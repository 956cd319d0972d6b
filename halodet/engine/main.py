"""Train or evaluate a detector, in one process or many: what tools/train_net.py does."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from halodet.checkpoint import LoadedCheckpoint, classes_of, load_weights, read_weights
from halodet.config.load import find_config, load_config
from halodet.config.projects import AddConfig, add_project_arguments, import_projects
from halodet.config.validate import validate
from halodet.data.classes import check_classes, count_classes, save_classes, saved_classes
from halodet.data.user_datasets import prepare_datasets, register_user_data, register_user_data_again, user_data_files
from halodet.engine.check_detector import check_datasets
from halodet.engine.distributed import (
    check_shared,
    create_exit_group,
    detect_dist_env,
    init_distributed,
    run_and_broadcast_errors,
    wait_for_all_ranks,
)
from halodet.engine.preemption import exit_on_preemption, forward_signals
from halodet.engine.run_info import start_run
from halodet.engine.startup import build_meta_model, check_weights, choose_seed
from halodet.engine.trainer import Trainer
from halodet.errors import ConfigError, HalodetError
from halodet.solver.lr_scaling import scale_to_batch
from halodet.utils.io import check_writable
from halodet.utils.warning_filters import ignore_detectron2_warnings

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException

logger = logging.getLogger(__name__)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of Detectron2's flags for training and of halodet's."""
    parser = default_argument_parser()
    parser.description = description
    add_training_arguments(parser)
    return parser


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add halodet's flags for training to those of Detectron2."""
    parser.add_argument("--allow-pickle", action="store_true", help="read pickle files, which may run code")
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="time limit of the rendezvous and of each collective operation (default: %(default)g)",
    )
    add_project_arguments(parser)
    data = parser.add_argument_group(
        "data of your own, instead of the config's datasets",
        "a COCO json with its image folder, a YOLO data.yaml, or a folder of Pascal VOC xml files",
    )
    data.add_argument(
        "--train-json", action=_StoreLast, metavar="FILE", help="data to train on; its classes become the model's"
    )
    data.add_argument("--train-images", action=_StoreLast, metavar="DIR", help="folder of the images of --train-json")
    data.add_argument("--val-json", action=_StoreLast, metavar="FILE", help="data to evaluate on")
    data.add_argument("--val-images", action=_StoreLast, metavar="DIR", help="folder of the images of --val-json")
    data.add_argument(
        "--crowds-as-objects", action="store_true", help="treat annotations with iscrowd=1 as single objects"
    )


class _StoreLast(argparse.Action):
    """Store a value, and say so if it replaces another one: it may have been meant to be added."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        if before not in (None, values):
            message = f"{option_string} {values} replaces {before}; to use both, merge them into one file"
            print(f"{parser.prog}: warning: {message}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def user_files(args: argparse.Namespace) -> tuple[str | None, ...]:
    """Return the arguments of :func:`argument_parser` for a user's own data, for ``validate_user_data``."""
    return args.train_json, args.train_images, args.val_json, args.val_images


@record
def main(args: argparse.Namespace, run: Callable[[argparse.Namespace], Any] | None = None) -> int:
    """Train, resume or evaluate as the arguments of tools/train_net.py say.

    The processes of the run are those that torchrun or srun started, or those that ``--num-gpus`` starts here.

    Args:
        args: arguments of the command line.
        run: function of a module that each rank calls with ``args``; :func:`run_config` by default.

    Returns:
        The exit code. A preempted run raises SystemExit(75).
    """
    run, timeout = run or run_config, timedelta(minutes=args.dist_timeout)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    setup_logger(distributed_rank=int(rank != "0"), name="halodet")
    with exit_on_preemption():
        try:
            if args.num_gpus * args.num_machines > 1:
                check_num_gpus(args)
                return launch_ranks(args, timeout, run)
            env = detect_dist_env()
            if env:
                init_distributed(env, timeout)
        except HalodetError as error:
            return report_error(error, int(rank != "0"))
        return run_rank(args, run)


def launch_ranks(args: argparse.Namespace, timeout: timedelta, run: Callable[[argparse.Namespace], Any]) -> int:
    """Run :func:`run_rank` in ``args.num_gpus`` processes of this machine with Detectron2's ``launch``."""
    try:
        with forward_signals():
            arguments = (args, run)
            launch(_exit_with, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, arguments, timeout)
    except ProcessExitedException as error:
        if error.signal_name is not None:
            print(f"Rank {args.machine_rank * args.num_gpus + error.error_index}: {error}", file=sys.stderr)
        return error.exit_code if error.signal_name is None else 1
    return 0


def _exit_with(args: argparse.Namespace, run: Callable[[argparse.Namespace], Any]) -> None:
    with exit_on_preemption():
        code = run_rank(args, run)
    if code:
        sys.exit(code)


def check_num_gpus(args: argparse.Namespace) -> None:
    """Check that ``--num-gpus`` can start its processes."""
    expected = f"at most {torch.cuda.device_count()}, the number of GPUs here"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        expected = "no --num-gpus under torchrun, which has started the processes"
    elif args.num_gpus <= max(torch.cuda.device_count(), 1):
        return
    raise ConfigError(f"--num-gpus={args.num_gpus} is invalid: expected {expected}.")


def run_rank(args: argparse.Namespace, run: Callable[[argparse.Namespace], Any]) -> int:
    """Call ``run`` in this rank, and log an expected error; return the exit code."""
    ignore_detectron2_warnings()
    setup_logger(distributed_rank=comm.get_rank(), name="halodet")
    logging.getLogger("halodet").addHandler(logging.NullHandler())  # other ranks are silent until they have a log file
    try:
        create_exit_group()
        run(args)
    except HalodetError as error:
        return report_error(error, comm.get_rank())
    if comm.get_world_size() > 1:
        dist.destroy_process_group()
    return 0


def run_config(args: argparse.Namespace) -> None:
    """Run this rank: rank 0 checks everything and broadcasts the config, then all ranks train or evaluate."""
    loaded: LoadedCheckpoint | None = None  # stays on rank 0
    projects: list[AddConfig] = []

    def prepare() -> CfgNode:
        nonlocal loaded
        cfg, loaded = setup(args, projects)
        return cfg

    run_and_broadcast_errors(lambda: projects.extend(import_projects(args.imports)))
    cfg = run_and_broadcast_errors(prepare, comm.is_main_process())[0]
    if not comm.is_main_process():
        args.config_file = ""  # Detectron2 would open it to log it
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="halodet")
    train_or_evaluate(args, cfg, loaded)


def report_error(error: HalodetError, rank: int) -> int:
    """Log an expected error once, also when all ranks have it; return its exit code.

    The other ranks wait until rank 0 has logged it: torchrun ends all processes once the first has exited. A rank whose
    error rank 0 does not have prints it.
    """
    logger.error("%s", error)
    together = dist.is_initialized() and wait_for_all_ranks()
    if rank > 0 and not together:
        print(f"[rank {rank}] {error}", file=sys.stderr)
    return error.exit_code


def setup(args: argparse.Namespace, projects: Sequence[AddConfig] = ()) -> tuple[CfgNode, LoadedCheckpoint | None]:
    """Load the config and check data, model and weights, so that a mistake is found before anything long starts.

    Returns:
        The config of the run, and the checkpoint it starts from, None for random weights.
    """
    args.config_file = str(find_config(args.config_file))
    unsafe = args.allow_unsafe_config
    cfg = load_config(args.config_file, args.opts, add_configs=projects, allow_unsafe=unsafe)
    validate(cfg, train=not args.eval_only)  # this trainer does not know more values than halodet's
    check_writable(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, name="halodet", configure_stdout=False)
    cfg = (cfg if args.eval_only else scale_to_batch(cfg)).clone()
    world_size = comm.get_world_size()
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH={cfg.SOLVER.IMS_PER_BATCH} is invalid: expected a multiple of {world_size} ranks."
        )
    if any(files := user_files(args)):
        classes = trained_classes(cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, args) if args.eval_only else None
        cfg = register_user_data(cfg, *files, crowds_as_objects=args.crowds_as_objects, classes=classes)
    options = {"eval_only": args.eval_only, "resume": args.resume, "allow_pickle": args.allow_pickle}
    model = build_meta_model(cfg)
    loaded = check_weights(cfg, model, **options)
    prepare_datasets(cfg, train=not args.eval_only)
    check_datasets(cfg, model, train=not args.eval_only)
    cfg.defrost()
    if args.eval_only:
        if args.resume and os.path.samefile(os.path.dirname(loaded.path), cfg.OUTPUT_DIR):
            cfg.MODEL.WEIGHTS = loaded.path
        check_classes(cfg.MODEL.WEIGHTS, count_classes(cfg), cfg.DATASETS.TEST, classes_of(loaded.checkpoint))
    elif cfg.SEED < 0:
        cfg.SEED = choose_seed(loaded.checkpoint if args.resume and loaded else None)
    cfg.freeze()
    return cfg, loaded


def trained_classes(weights: str, output_dir: str, args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Return the classes of the weights that ``--eval-only`` evaluates: of classes.json beside them, or the file."""
    resumed = args.resume and os.path.isfile(os.path.join(output_dir, "last_checkpoint"))
    saved = saved_classes(os.path.join(output_dir, "last_checkpoint") if resumed else weights)
    if saved is None and not resumed and os.path.isfile(weights):
        return classes_of(read_weights(weights, allow_pickle=args.allow_pickle).checkpoint)
    return saved


def train_or_evaluate(args: argparse.Namespace, cfg: CfgNode, loaded: LoadedCheckpoint | None) -> dict | None:
    """Train or evaluate in this rank; ``loaded`` is the checkpoint that :func:`setup` read, on rank 0."""
    if comm.get_world_size() > 1:
        tag = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        check_shared([*user_data_files(cfg.OUTPUT_DIR, names), *([tag] if args.resume else [])])
        register_user_data_again(cfg.OUTPUT_DIR, names)
        run_and_broadcast_errors(partial(check_machine, cfg, args), not comm.is_main_process())
    start_run(cfg, args, cfg.OUTPUT_DIR, cfg.SEED)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        load_weights(model, cfg.MODEL.WEIGHTS, allow_pickle=args.allow_pickle, preloaded=loaded)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results = {**results, **Trainer.test_with_tta(cfg, model)}
        if comm.is_main_process():
            verify_results(cfg, results)  # with TEST.EXPECTED_RESULTS, as after training
        return results
    trainer = Trainer(cfg, allow_pickle=args.allow_pickle)
    if comm.is_main_process():
        save_classes(cfg.DATASETS.TRAIN[0], cfg.OUTPUT_DIR)
    trainer.checkpointer.preloaded = loaded
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def check_machine(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check on each other machine what :func:`setup` has checked on that of rank 0; fetch weights once per machine."""
    if cfg.MODEL.DEVICE.startswith("cuda") and comm.get_local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={comm.get_local_size()} is invalid: expected at most {torch.cuda.device_count()}, the "
            "number of GPUs of this machine. Fix: start fewer, or set MODEL.DEVICE cpu."
        )
    if comm.get_local_rank() == 0:
        check_writable(cfg.OUTPUT_DIR)
        prepare_datasets(cfg, train=not args.eval_only)
        if cfg.MODEL.WEIGHTS and not args.resume:
            PathManager.get_local_path(cfg.MODEL.WEIGHTS.partition("?")[0])
