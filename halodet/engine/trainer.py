"""Detectron2's trainer with COCO evaluation and halodet's optimizers."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import weakref
from functools import partial

from halodet.checkpoint import Checkpointer
from halodet.data.bad_images import SkipTrackingLoader
from halodet.data.build import build_test_loader, build_train_loader
from halodet.engine.bad_image_hook import BadImageHook
from halodet.engine.checkpoint_hook import Checkpoints
from halodet.engine.distributed import broadcast_buffers, convert_sync_batchnorm, ddp_anywhere
from halodet.engine.ema import EMA
from halodet.engine.nan_guard import GoBack, RollBack
from halodet.engine.performance import CompileError, compile_errors, speed_up
from halodet.engine.precise_bn import PreciseBN
from halodet.engine.preemption import PreemptionHook
from halodet.engine.progress import ProgressPrinter, Throughput
from halodet.engine.resume_state import RunState
from halodet.engine.stop import log_sentences_only
from halodet.engine.train_step import Step
from halodet.engine.visualization import DrawPredictions
from halodet.engine.wandb_writer import WandbWriter
from halodet.engine.writers import IgnoreIOErrors
from halodet.evaluation.build import build_evaluator
from halodet.evaluation.tta import evaluate_augmented
from halodet.solver.build import build_optimizer
from halodet.solver.lr_scaling import scale_to_batch

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.engine.hooks import PreciseBN as Detectron2PreciseBN
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """DefaultTrainer with COCO's metrics, SGD or AdamW (SOLVER.OPTIMIZER), and weights that are known to have arrived.

    Args:
        cfg: the run.
        allow_pickle: read pickle files that may run code as MODEL.WEIGHTS.
    """

    def __init__(self, cfg: CfgNode, *, allow_pickle: bool = False) -> None:
        self._trust_pickle = allow_pickle
        log_sentences_only()
        with ddp_anywhere(), warnings.catch_warnings():  # of the AMPTrainer that Detectron2 makes, and Step replaces
            warnings.filterwarnings("ignore", message=".*torch.cuda.amp.GradScaler")
            super().__init__(scale_to_batch(cfg))

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, around this package's step and checkpointer, and what makes a run go on as it was and stop when asked."""
        self._trainer = Step.of(self.cfg, self._trainer)
        self._go_back = GoBack()
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            min_loaded=self.cfg.MODEL.WEIGHTS_MIN_LOADED,
            allow_pickle=self._trust_pickle,
            trainer=weakref.proxy(self),
        )
        report = BadImageHook(
            self._trainer.data_loader,
            self.cfg.OUTPUT_DIR,
            max_share=self.cfg.DATALOADER.MAX_BAD_IMAGES,
            checkpoint_period=self.cfg.SOLVER.CHECKPOINT_PERIOD,
        )
        cfg, early, late = self.cfg, [Throughput(self.cfg.SOLVER.IMS_PER_BATCH * self.cfg.SOLVER.GRAD_ACCUM_STEPS)], []
        if cfg.MODEL.EMA.ENABLED:
            ema = EMA(self.model, cfg.MODEL.EMA.DECAY, cfg.OUTPUT_DIR)
            self.checkpointer.add_checkpointable("ema", ema.average)
            early.append(ema)
            late.append(
                EvalHook(cfg.TEST.EVAL_PERIOD, lambda: {"ema": self.test_into("inference_ema", cfg, ema.model)})
            )
        if cfg.TEST.AUG.ENABLED:  # it takes many times as long, so only at the end, as in Detectron2's training tool
            late.append(EvalHook(0, lambda: self.test_with_tta(cfg, self.model)))
        if cfg.TEST.AUG.ENABLED and cfg.MODEL.EMA.ENABLED:
            late.append(EvalHook(0, lambda: {"ema": self.test_with_tta(cfg, ema.model, "inference_ema_TTA")}))
        if cfg.TEST.VIS_PERIOD and cfg.TEST.VIS_IMAGES and cfg.DATASETS.TEST and comm.is_main_process():
            late.append(DrawPredictions(cfg, cfg.DATASETS.TEST[0]))
        state = RunState(self.data_loader.loader, self.checkpointer.model, cfg)
        checkpoints = Checkpoints(
            self.checkpointer, state, report, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP
        )
        models = [self.model, *(hook.model for hook in early if isinstance(hook, EMA))]
        self.signals = PreemptionHook(checkpoints, models, (cfg.TEST.EVAL_PERIOD, cfg.TEST.VIS_PERIOD))
        hooks = [
            hook for hook in super().build_hooks() if hook is not None and not isinstance(hook, PeriodicCheckpointer)
        ]
        hooks = [PreciseBN.of(cfg, hook) if isinstance(hook, Detectron2PreciseBN) else hook for hook in hooks]
        # What changes the weights or measures comes before checkpoints, these before an evaluation, which may fail or take longer than a
        # signal gives, and what is measured then before it is written.
        place = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        end = next((i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicWriter)), len(hooks))
        early += [checkpoints, self.signals]
        return [state, self._go_back, report, *hooks[:place], *early, *hooks[place:end], *late, *hooks[end:]]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's log line with images per second, data and memory; metrics.json, TensorBoard and, if asked for, W&B."""
        _, *others = super().build_writers()
        others = [IgnoreIOErrors(writer) for writer in others]
        return [ProgressPrinter(self.max_iter), *([WandbWriter(self.cfg)] if self.cfg.WANDB.ENABLED else []), *others]

    def run_step(self) -> None:
        """One iteration; the last ones again where SOLVER.NON_FINITE_POLICY is rollback and this one is not finite."""
        try:
            super().run_step()
        except RollBack as why:
            self._go_back.go_back(str(why))
        except compile_errors(self.cfg) as error:
            raise CompileError(error) from error

    def after_train(self) -> None:
        """Hooks' ends. Where the loop has not come to its end, nothing is evaluated: other processes would not be there to share that."""
        if self.iter < self.max_iter:  # Detectron2's EvalHook takes a last iteration that failed for one that is done
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        super().after_train()

    def train(self) -> dict | None:
        """As Detectron2's; leaves with an exit code of its own (SystemExit) when it is asked to stop, 75, or cannot write, 74."""
        # TorchScript compiles RetinaNet's loss anew after the first iterations of a process, and it then rounds differently: a run that
        # goes on would not equal the one that was not interrupted. On the CPU, where that is promised, it is
        # not compiled, which costs a fifth of that loss's time.
        scripts = torch.jit.optimized_execution(self.cfg.MODEL.DEVICE != "cpu")
        with self.signals, contextlib.closing(self.data_loader), scripts:
            return super().train()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's, whose SyncBN also works on the CPU, with what MODEL.TF32, CHANNELS_LAST and COMPILE ask for."""
        return speed_up(cfg, convert_sync_batchnorm(super().build_model(cfg)))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Detectron2's, shared by all processes, each of which evaluates the very model that rank 0 saves."""
        broadcast_buffers(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> SkipTrackingLoader:
        """Detectron2's loader, which leaves out images that cannot be used."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Detectron2's loader, in which images that cannot be used are blank."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str = "inference") -> DatasetEvaluator:
        """Build the evaluator of a dataset; predictions are written to ``folder`` in OUTPUT_DIR."""
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test_into(cls, folder: str, cfg: CfgNode, model: nn.Module) -> dict:
        """As ``test``, with the predictions in a folder of their own in OUTPUT_DIR."""
        logger.info(f"Evaluation with predictions in {os.path.join(cfg.OUTPUT_DIR, folder)}:")
        return cls.test(cfg, model, [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST])

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module, folder: str = "inference_TTA") -> dict:
        """As ``test_into``, under the augmentation of TEST.AUG; each result's name ends in ``_TTA``."""
        return evaluate_augmented(partial(cls.test_into, folder, cfg), cfg, model)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD or AdamW with the rates and decays that SOLVER gives each part of the model."""
        return build_optimizer(cfg, model)
