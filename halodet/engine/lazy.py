"""Train or evaluate a LazyConfig with halodet's hooks: what tools/lazyconfig_train_net.py does."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
from typing import Any

from halodet.checkpoint import Checkpointer, LoadedCheckpoint, ModelSpec, classes_of, load_weights
from halodet.config.lazy import flatten, load_lazy_config
from halodet.config.projects import import_projects
from halodet.config.validate import one_line
from halodet.data.bad_images import SkipTrackingLoader
from halodet.data.classes import check_classes, count_classes, dataset_classes, save_classes
from halodet.data.user_datasets import (
    UserData,
    prepare_dataset,
    register_user_data_again,
    set_lazy_user_data,
    user_data_files,
    validate_user_data,
)
from halodet.engine.bad_image_hook import BadImageHook
from halodet.engine.checkpoint_hook import CheckpointHook
from halodet.engine.distributed import broadcast_buffers, check_shared, convert_sync_batchnorm, run_and_broadcast_errors
from halodet.engine.hooks import EMA, EvalHook, Throughput, unwrap_ddp
from halodet.engine.main import trained_classes, user_files
from halodet.engine.nan_guard import NanGuard
from halodet.engine.performance import PRECISIONS
from halodet.engine.preemption import PreemptionHook
from halodet.engine.resume_state import ResumeState
from halodet.engine.run_info import start_run
from halodet.engine.startup import build_on_meta, choose_seed, find_weights
from halodet.engine.train_step import GradAccumTrainer
from halodet.engine.writers import IgnoreIOErrors, ProgressPrinter
from halodet.errors import ConfigError
from halodet.evaluation.coco import RobustCOCOEvaluator
from halodet.utils.io import check_writable

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, create_ddp_model, default_writers
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicWriter
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

logger = logging.getLogger(__name__)

# Prefixes of keys that training does not depend on.
_IGNORED_KEYS = ("dataloader.test", "dataloader.evaluator", "train.output_dir", "train.init_checkpoint",
                 "train.checkpointer", "train.eval_period", "train.log_period", "train.max_bad_images",
                 "dataloader.train.loader.num_workers", "train.seed")  # fmt: skip


def run_lazy_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train or evaluate a LazyConfig in this rank; for :func:`halodet.engine.main.main`.

    Raises:
        HalodetError: the config, data or weights cannot be used, or training cannot continue.
    """
    loaded: LoadedCheckpoint | None = None  # stays on rank 0
    data: UserData | None = None

    def load() -> DictConfig:
        import_projects(args.imports)
        return load_lazy_config(args.config_file, args.opts, allow_unsafe=args.allow_unsafe_config)

    def prepare_data() -> UserData | None:
        check_writable(cfg.train.output_dir)
        setup_logger(cfg.train.output_dir, name="halodet", configure_stdout=False)
        if not any(files := user_files(args)):
            return None
        masks = "True" in _values(cfg.dataloader.get("train"), "use_instance_mask")
        weights = cfg.train.init_checkpoint
        classes = trained_classes(weights, cfg.train.output_dir, args) if args.eval_only else None
        options = {"need_masks": masks, "crowds_as_objects": args.crowds_as_objects, "classes": classes}
        return validate_user_data(cfg.train.output_dir, *files, **options)

    def prepare() -> dict[str, Any]:
        nonlocal loaded
        loaded = _check(args, cfg, data)
        if args.eval_only:
            weights = loaded.path if args.resume and loaded else cfg.train.init_checkpoint
            check_classes(weights, count_classes(cfg), _values(cfg.dataloader.get("test"), "names"),
                          classes_of(loaded.checkpoint))  # fmt: skip
            return {"init_checkpoint": weights}
        seed = choose_seed(loaded.checkpoint if args.resume and loaded else None) if cfg.train.seed < 0 else None
        return {} if seed is None else {"seed": seed}

    # Each rank executes the file, as with Detectron2's tool: its objects need not be picklable.
    configs: list[DictConfig] = []
    run_and_broadcast_errors(lambda: configs.append(load()))
    cfg = configs[0]
    output_dir = cfg.train.output_dir
    data = run_and_broadcast_errors(prepare_data, comm.is_main_process())[0]
    if data:
        names = list(data.names.values())
        check_shared(user_data_files(output_dir, names))
        register_user_data_again(output_dir, names)
        set_lazy_user_data(cfg, data)
    cfg.train.update(run_and_broadcast_errors(prepare, comm.is_main_process())[0])
    if not comm.is_main_process():
        args.config_file = ""  # Detectron2 would open it to log it
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name="halodet")
    start_run(cfg, args, output_dir, cfg.train.seed)
    if not args.eval_only:
        return do_train(args, cfg, loaded)
    model = _build_model(cfg)
    load_weights(model, cfg.train.init_checkpoint, allow_pickle=args.allow_pickle, preloaded=loaded)
    return do_test(cfg, model)


def do_train(args: argparse.Namespace, cfg: DictConfig, loaded: LoadedCheckpoint | None = None) -> dict | None:
    """Train the model of a LazyConfig, as ``do_train`` of Detectron2's tools/lazyconfig_train_net.py.

    Args:
        args: arguments with ``resume`` and ``allow_pickle``.
        cfg: config with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``.
        loaded: checkpoint that the run starts from, if it has been read, on rank 0.

    Returns:
        The results of the last evaluation.
    """
    train = cfg.train
    model = _build_model(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params.model  # the config can be saved again
    data_loader = instantiate(cfg.dataloader.train)
    for name in _values(cfg.dataloader.train, "names")[:1]:
        model.halodet_classes = dataset_classes(name)  # for the checkpoints
        if comm.is_main_process():
            save_classes(name, train.output_dir)
    device_ids = {"device_ids": None} if train.device == "cpu" else {}
    model = create_ddp_model(model, **{**train.ddp, **device_ids})
    trainer = GradAccumTrainer(
        model,
        data_loader,
        optimizer,
        accum_steps=train.grad_accum_steps,
        dtype=_autocast_dtype(cfg),
        guard=NanGuard(**train.nan_guard),
    )
    checkpointer = Checkpointer(
        model, train.output_dir, min_loaded=train.min_loaded, allow_pickle=args.allow_pickle, trainer=trainer
    )
    ema = EMA(model, train.ema.decay, train.output_dir) if train.ema.enabled else None
    if ema:
        checkpointer.add_checkpointable("ema", ema.average)
    results: dict[str, Any] = {}
    hooks, preemption = _build_hooks(cfg, trainer, checkpointer, ema, results)
    trainer.register_hooks(hooks)
    checkpointer.preloaded = loaded
    resumed = checkpointer.resume_or_load(train.init_checkpoint, resume=args.resume)
    start_iter = trainer.iter + 1 if args.resume and "iteration" in resumed else 0
    with contextlib.ExitStack() as stack:
        # see Trainer.train
        stack.enter_context(torch.jit.optimized_execution(train.device != "cpu"))
        stack.callback(getattr(data_loader, "close", lambda: None))
        stack.enter_context(preemption)
        trainer.train(start_iter, train.max_iter)
    return results


def _build_hooks(
    cfg: DictConfig, trainer: GradAccumTrainer, checkpointer: Checkpointer, ema: EMA | None, results: dict[str, Any]
) -> tuple[list[HookBase], PreemptionHook]:
    """Build the hooks in the order in which they run; see :meth:`halodet.engine.Trainer.build_hooks`."""
    train, data_loader = cfg.train, trainer.data_loader
    tracked = data_loader if isinstance(data_loader, SkipTrackingLoader) else None
    batch_size = tracked.loader.total_batch_size if tracked else cfg.dataloader.train.get("total_batch_size", 1)
    config = {key: value for key, value in flatten(cfg).items() if not key.startswith(_IGNORED_KEYS)}
    resume_state = ResumeState(tracked and tracked.loader, checkpointer.model, batch_size, config)
    hooks: list[HookBase] = [resume_state]
    before_save = [resume_state.gather]
    period = train.checkpointer.period
    if tracked:
        share = train.max_bad_images
        bad_images = BadImageHook(tracked, train.output_dir, max_share=share, checkpoint_period=period)
        hooks.append(bad_images)
        before_save.append(bad_images.collect)
    else:
        logger.warning("dataloader.train is not halodet's: bad images are not counted, resume is not bit-exact")
    scheduler = LRScheduler(scheduler=instantiate(cfg.lr_multiplier))
    hooks += [IterationTimer(), scheduler, Throughput(batch_size * train.grad_accum_steps), *([ema] if ema else [])]
    checkpoint_hook = CheckpointHook(checkpointer, period, train.checkpointer.get("max_to_keep") or 0, before_save)
    evaluated = [trainer.model, *([ema.model] if ema else [])]
    preemption = PreemptionHook(checkpoint_hook, evaluated, (train.eval_period,))

    def evaluate() -> dict[str, Any]:
        results.update(do_test(cfg, trainer.model) or {})
        return results

    hooks += [checkpoint_hook, preemption, EvalHook(train.eval_period, evaluate)]
    if ema:
        hooks.append(EvalHook(train.eval_period, lambda: {"ema": do_test(cfg, ema.model, "inference_ema")}))
    if comm.is_main_process():
        _, *files = default_writers(train.output_dir, train.max_iter)
        writers = [ProgressPrinter(train.max_iter), *map(IgnoreIOErrors, files)]
        hooks.append(PeriodicWriter(writers, period=train.log_period))
    return hooks, preemption


def build_evaluator(cfg: DictConfig, folder: str) -> Any:
    """Build ``dataloader.evaluator``, which writes to ``folder`` and counts all detections that the model returns."""
    evaluator = cfg.dataloader.evaluator
    if not isinstance(evaluator, DictConfig):
        return instantiate(evaluator)
    evaluator = evaluator.copy()
    evaluator._set_parent(cfg.dataloader)
    if folder != "inference" and "output_dir" in evaluator:
        evaluator.output_dir = os.path.join(cfg.train.output_dir, folder)
    limits = [_values(cfg.model, key) for key in ("test_topk_per_image", "max_detections_per_image")]
    numbers = [int(value) for values in limits for value in values]
    if numbers and evaluator.get("_target_") is RobustCOCOEvaluator:
        evaluator.setdefault("detections_per_image", max(numbers))
    return instantiate(evaluator)


def do_test(cfg: DictConfig, model: nn.Module, folder: str = "inference") -> dict[str, Any] | None:
    """Evaluate with ``dataloader.test`` and ``dataloader.evaluator``; None if the config has no evaluator."""
    if "evaluator" not in cfg.dataloader:
        return None
    broadcast_buffers(unwrap_ddp(model))
    evaluator = build_evaluator(cfg, folder)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _autocast_dtype(cfg: DictConfig) -> torch.dtype | None:
    amp = cfg.train.amp
    precision = amp.get("precision", "fp16")  # Detectron2's AMPTrainer
    if precision not in PRECISIONS:
        raise ValueError(f"train.amp.precision={precision} is invalid: expected one of {', '.join(PRECISIONS)}.")
    return PRECISIONS[precision] if amp.enabled else None


def _build_model(cfg: DictConfig) -> nn.Module:
    return convert_sync_batchnorm(instantiate(cfg.model).to(cfg.train.device))


def _check(args: argparse.Namespace, cfg: DictConfig, data: UserData | None) -> LoadedCheckpoint | None:
    """Check data, model and weights on rank 0, before anything long starts; return the checkpoint to start from."""
    train = cfg.train
    needed = "val" if args.eval_only else "train"
    if data and needed not in data.names:
        raise ConfigError(f"--{needed}-json is missing. Fix: give it with --{needed}-images.")
    batch_size = OmegaConf.select(cfg, "dataloader.train.loader.total_batch_size", default=0)
    if not args.eval_only and batch_size % comm.get_world_size():
        raise ConfigError(
            f"dataloader.train.loader.total_batch_size={batch_size} is invalid: expected a multiple of "
            f"{comm.get_world_size()} ranks."
        )
    try:
        NanGuard(**train.nan_guard)
        _autocast_dtype(cfg)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train is invalid: {one_line(error)}") from error
    spec = ModelSpec.of(build_on_meta(lambda device: instantiate(cfg.model)))
    known = {key: cfg.model[key] for key in ("input_format", "pixel_mean", "pixel_std") if key in cfg.model}
    known = {key: tuple(value) if isinstance(value, ListConfig) else value for key, value in known.items()}
    names = () if args.eval_only else _values(cfg.dataloader.get("train"), "names")
    spec = dataclasses.replace(spec, **known, classes=dataset_classes(next(iter(names), "")))
    options = {"eval_only": args.eval_only, "resume": args.resume, "allow_pickle": args.allow_pickle}
    loaded = find_weights(spec, train.init_checkpoint, train.output_dir, min_loaded=train.min_loaded, **options)
    evaluated = ("test",) if "evaluator" in cfg.dataloader else ()
    for split in evaluated if args.eval_only else ("train", *evaluated):
        for name in _values(cfg.dataloader.get(split), "names"):
            prepare_dataset(name, read=split == "test")
    return loaded


def _values(cfg: Any, name: str) -> list[str]:
    """Return all values of ``name`` within a config, as strings; Detectron2's loaders call datasets ``names``."""
    items = flatten(cfg).items() if isinstance(cfg, DictConfig) else ()
    return [value for key, value in items if name in key.split(".") and "${" not in value]
