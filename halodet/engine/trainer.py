"""Detectron2's DefaultTrainer with bit-exact resume, a NaN guard, EMA and tolerance of bad images."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from functools import partial
from inspect import signature

from halodet.checkpoint import Checkpointer
from halodet.data.bad_images import SkipTrackingLoader
from halodet.data.build import build_test_loader, build_train_loader
from halodet.data.classes import dataset_classes
from halodet.data.transforms import ResizeShortestEdge
from halodet.engine.bad_image_hook import BadImageHook
from halodet.engine.checkpoint_hook import CheckpointHook
from halodet.engine.distributed import broadcast_buffers, convert_sync_batchnorm
from halodet.engine.hooks import EMA, EvalHook, PreciseBN, Throughput, VisualizePredictions
from halodet.engine.nan_guard import NanGuard
from halodet.engine.performance import CompileError, apply_performance_flags, autocast_dtype, compile_errors
from halodet.engine.preemption import PreemptionHook
from halodet.engine.resume_state import ResumeState, training_config
from halodet.engine.train_step import GradAccumTrainer
from halodet.engine.writers import IgnoreIOErrors, ProgressPrinter, WandbWriter
from halodet.errors import HalodetError
from halodet.evaluation.build import build_evaluator
from halodet.evaluation.tta import evaluate_augmented
from halodet.solver.build import build_lr_scheduler, build_optimizer
from halodet.solver.lr_scaling import scale_to_batch

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicWriter
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """DefaultTrainer for halodet's configs.

    Subclasses may override the ``build_*`` methods as with Detectron2. With a loader other than halodet's, bad images
    are not counted, and a resumed run starts its data from the beginning.

    Args:
        cfg: config of the run.
        allow_pickle: read pickle files as MODEL.WEIGHTS even if they may execute code.
    """

    def __init__(self, cfg: CfgNode, *, allow_pickle: bool = False) -> None:
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # as DefaultTrainer does for programs that have not called it
        if not logging.getLogger("halodet").handlers:
            setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="halodet")
        logging.getLogger("detectron2.engine.train_loop").addFilter(_drop_traceback)
        cfg = DefaultTrainer.auto_scale_workers(scale_to_batch(cfg), comm.get_world_size())
        self.cfg, self.start_iter, self.max_iter = cfg, 0, cfg.SOLVER.MAX_ITER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model.halodet_classes = dataset_classes(cfg.DATASETS.TRAIN[0])  # for the checkpoints
        on_cpu = next(model.parameters()).device.type == "cpu"
        model = create_ddp_model(model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {}))
        self._trainer = GradAccumTrainer(
            model,
            data_loader,
            optimizer,
            accum_steps=cfg.SOLVER.GRAD_ACCUM_STEPS,
            dtype=autocast_dtype(cfg),
            guard=NanGuard(cfg.SOLVER.NON_FINITE_POLICY, cfg.SOLVER.NON_FINITE_MAX_STEPS),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            min_loaded=cfg.MODEL.WEIGHTS_MIN_LOADED,
            allow_pickle=allow_pickle,
            trainer=weakref.proxy(self),
        )
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Build the hooks in the order in which they run."""
        cfg, test = self.cfg, self.cfg.TEST
        loader = self.data_loader if isinstance(self.data_loader, SkipTrackingLoader) else None
        resume_state = ResumeState(
            loader and loader.loader, self.checkpointer.model, cfg.SOLVER.IMS_PER_BATCH, training_config(cfg)
        )
        hooks: list[HookBase] = [resume_state]
        before_save = [resume_state.gather]
        if loader is None:
            logger.warning("build_train_loader() is not halodet's: bad images are not counted, resume is not bit-exact")
        else:
            share, period = cfg.DATALOADER.MAX_BAD_IMAGES, cfg.SOLVER.CHECKPOINT_PERIOD
            bad_images = BadImageHook(loader, cfg.OUTPUT_DIR, max_share=share, checkpoint_period=period)
            hooks.append(bad_images)
            before_save.append(bad_images.collect)
        hooks += [IterationTimer(), LRScheduler(), Throughput(cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.GRAD_ACCUM_STEPS)]

        # What changes the weights runs before the checkpoint.
        if test.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            no_workers = cfg.clone()
            no_workers.defrost()
            no_workers.DATALOADER.NUM_WORKERS = 0
            bn_loader = self.build_train_loader(no_workers)
            hooks.append(PreciseBN(test.EVAL_PERIOD, self.model, bn_loader, test.PRECISE_BN.NUM_ITER))
        ema = EMA(self.model, cfg.MODEL.EMA.DECAY, cfg.OUTPUT_DIR) if cfg.MODEL.EMA.ENABLED else None
        if ema:
            self.checkpointer.add_checkpointable("ema", ema.average)
            hooks.append(ema)

        # Evaluation comes after the checkpoint, since it may fail or take longer than the notice of a signal.
        solver = cfg.SOLVER
        checkpoint_hook = CheckpointHook(
            self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_MAX_TO_KEEP, before_save
        )
        evaluated = [self.model, *([ema.model] if ema else [])]
        self.preemption = PreemptionHook(checkpoint_hook, evaluated, (test.EVAL_PERIOD, test.VIS_PERIOD))
        hooks += [checkpoint_hook, self.preemption]

        hooks.append(EvalHook(test.EVAL_PERIOD, self._evaluate))
        if ema:
            evaluate_ema = partial(self.test_into, "inference_ema", cfg, ema.model)
            hooks.append(EvalHook(test.EVAL_PERIOD, lambda: {"ema": evaluate_ema()}))
        if test.AUG.ENABLED:  # after training only, as in Detectron2's train_net.py
            hooks.append(EvalHook(0, lambda: self.test_with_tta(cfg, self.model)))
        if test.AUG.ENABLED and ema:
            hooks.append(EvalHook(0, lambda: {"ema": self.test_with_tta(cfg, ema.model, "inference_ema_TTA")}))

        if comm.is_main_process():
            if test.VIS_PERIOD and test.VIS_IMAGES and cfg.DATASETS.TEST:
                resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
                visualize = partial(VisualizePredictions, image_format=cfg.INPUT.FORMAT, augmentation=resize)
                hooks.append(visualize(cfg.DATASETS.TEST[0], test.VIS_PERIOD, test.VIS_IMAGES))
            hooks.append(PeriodicWriter(self.build_writers(), period=20))
        return hooks

    def _evaluate(self) -> dict:
        self._last_eval_results = self.test(self.cfg, self.model)  # DefaultTrainer compares it with EXPECTED_RESULTS
        return self._last_eval_results

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers, with throughput in the progress line, and the W&B writer of WANDB.ENABLED."""
        _, *files = super().build_writers()
        cfg, wandb = self.cfg, []
        if cfg.WANDB.ENABLED:
            wandb.append(WandbWriter(cfg.OUTPUT_DIR, cfg.WANDB.PROJECT, yaml.safe_load(cfg.dump())))
        return [ProgressPrinter(self.max_iter), *wandb, *map(IgnoreIOErrors, files)]

    def train(self) -> dict | None:
        """Train.

        Raises:
            HalodetError: training cannot continue.
            SystemExit: with code 75, after a signal asked the run to stop.
        """
        with contextlib.ExitStack() as stack:
            # TorchScript recompiles RetinaNet's loss after the first iterations of a process and then rounds
            # differently, so a resumed run would differ. On the CPU, where resuming is bit-exact, it is not compiled.
            stack.enter_context(torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu"))
            stack.callback(getattr(self.data_loader, "close", lambda: None))
            stack.enter_context(self.preemption)
            return super().train()

    def run_step(self) -> None:
        try:
            super().run_step()
        except compile_errors(self.cfg) as error:
            raise CompileError(error) from error

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, with SyncBN that works on the CPU and the performance flags of the config."""
        return apply_performance_flags(cfg, convert_sync_batchnorm(super().build_model(cfg)))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer; see :func:`halodet.solver.build.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the schedule; see :func:`halodet.solver.build.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> SkipTrackingLoader:
        """Build the training loader, which skips images that cannot be used."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Build the test loader, which replaces images that cannot be used by blank ones."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """Build the evaluator of a dataset; predictions are written to ``output_folder`` (OUTPUT_DIR/inference)."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Evaluate on all ranks, with the buffers of rank 0, which are the ones in checkpoints."""
        broadcast_buffers(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_into(cls, folder: str, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate, with predictions in OUTPUT_DIR/``folder``."""
        output = os.path.join(cfg.OUTPUT_DIR, folder)
        logger.info("Evaluating with predictions in %s", output)
        if len(signature(cls.build_evaluator).parameters) < 3:  # overridden as DefaultTrainer has it
            cfg = cfg.clone()
            cfg.defrost()
            cfg.OUTPUT_DIR = output
            return cls.test(cfg, model, [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST])
        return cls.test(cfg, model, [cls.build_evaluator(cfg, name, output) for name in cfg.DATASETS.TEST])

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module, folder: str = "inference_TTA") -> dict:
        """Evaluate with the test-time augmentation of TEST.AUG; the names of the results end in ``_TTA``."""
        return evaluate_augmented(partial(cls.test_into, folder, cfg), cfg, model)


def _drop_traceback(record: logging.LogRecord) -> bool:
    """Drop the traceback of expected errors from a log record of Detectron2's training loop; the caller logs them."""
    if record.exc_info and isinstance(record.exc_info[1], HalodetError):
        record.exc_info, record.msg = None, "Training stops"
    return True
