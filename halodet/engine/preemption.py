"""Preemption: SIGTERM, SIGUSR1 (``sbatch --signal``) or Ctrl-C saves a checkpoint and ends the run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from halodet.engine.checkpoint_hook import CheckpointHook

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed, nn

logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
INTERRUPTED = 130  # exit code after Ctrl-C, as of shells
SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class PreemptionHook(HookBase):
    """Save a checkpoint and exit with code 75 after SIGTERM or SIGUSR1; in one process, with code 130 after Ctrl-C.

    The signal handler sets a flag. All ranks read it after each iteration, save and exit together. In an evaluation
    between iterations each rank exits before its next batch, and rank 0 saves first. In the final evaluation, when
    model_final.pth is saved, the process exits at once. Further signals are ignored, but a second Ctrl-C is not. Use as
    a context manager around ``train()``; outside of the main thread no handler is installed.

    Args:
        checkpoints: hook that saves the checkpoint.
        models: models that are evaluated between iterations.
        periods: iterations between two evaluations or visualizations; 0 for none.
    """

    def __init__(self, checkpoints: CheckpointHook, models: Sequence[nn.Module], periods: Sequence[int]) -> None:
        self.checkpoints, self._models, self._periods = checkpoints, models, [period for period in periods if period]
        self.received, self._evaluating, self._finished, self._process = 0, False, False, os.getpid()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> PreemptionHook:
        self.received, self._evaluating, self._finished, self._process = 0, False, False, os.getpid()
        # With several processes, the one that started them ends them at Ctrl-C. In the background, a shell ignores it.
        alone = comm.get_world_size() == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signals = (*SIGNALS, signal.SIGINT) if alone else SIGNALS
        self._exit.enter_context(_handling(self._receive, signals))
        for model in self._models:
            self._exit.callback(model.register_forward_pre_hook(self._before_forward).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def before_step(self) -> None:
        self._evaluating = False

    def after_step(self) -> None:
        self.received = self._of_any_rank()
        if self.received:
            self.checkpoints.save_now()
            self._leave()
        if any((self.trainer.iter + 1) % period == 0 for period in self._periods):
            self.checkpoints.prepare()
            self._evaluating = True

    def after_train(self) -> None:
        self._finished = self.trainer.iter >= self.trainer.max_iter - 1
        if self._finished and self.received:
            raise SystemExit(self._code())

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if self.received and self._evaluating and not model.training:
            if comm.is_main_process():
                self.checkpoints.save_prepared()
            self._leave()

    def _leave(self) -> None:
        name = signal.Signals(self.received).name
        logger.warning(
            "Stopped by %s after iteration %d with a checkpoint; resume with --resume (exit code %d)",
            name,
            self.trainer.iter,
            self._code(),
        )
        raise SystemExit(self._code())

    def _code(self) -> int:
        return INTERRUPTED if self.received == signal.SIGINT else PREEMPTED

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data loading worker
            return
        if self.received:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if self._finished:
            raise SystemExit(self._code())
        # Not through logging: the signal may have interrupted a log call that holds the lock.
        os.write(2, f"{signal.Signals(number).name}: stopping after this iteration\n".encode())

    def _of_any_rank(self) -> int:
        if comm.get_world_size() == 1:
            return self.received
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        number = torch.tensor(self.received, device=device)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        return int(number)


@contextlib.contextmanager
def exit_on_preemption() -> Iterator[None]:
    """Exit at once with code 75 on SIGTERM or SIGUSR1 while there is nothing to save: outside of training."""
    own = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            os.write(
                2, f"{signal.Signals(number).name}: stopped outside of training (exit code {PREEMPTED})\n".encode()
            )
        os._exit(PREEMPTED)

    with _handling(leave):
        yield


@contextlib.contextmanager
def forward_signals() -> Iterator[None]:
    """Forward SIGTERM and SIGUSR1 to the child processes, which ``--num-gpus`` started."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    with _handling(forward):
        yield


@contextlib.contextmanager
def _handling(handler: Any, signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Handle signals with ``handler``; without effect outside of the main thread, as Python has it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
