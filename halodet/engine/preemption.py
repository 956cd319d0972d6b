"""A run that is asked to stop writes a checkpoint first: SIGTERM, and SIGUSR1, which Slurm sends ahead of time (sbatch --signal)."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from halodet.engine.checkpoint_hook import Checkpoints

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed

logger = logging.getLogger(__name__)

PREEMPTED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
SAME_REQUEST = 5.0  # seconds: what stops all processes of a job also reaches torchrun, which stops its own once more


class StopOnSignal(HookBase):
    """At SIGTERM or SIGUSR1: end the iteration, write a checkpoint, leave with exit code 75; all processes of the run together.

    One that comes more than 5 seconds after the first leaves at once, with 128 + its number. During an evaluation between iterations rank
    0 writes the checkpoint at once; a run of one process leaves then, too, one of several after the evaluation and one more iteration. In
    the evaluation at the end, when everything is saved, each process leaves at once. Signals are caught inside ``with``, and in the main
    thread only, as Python has it.

    Args:
        checkpoints: writes the checkpoint.
        periods: iterations from one evaluation, or anything else that takes long, to the next; 0 for none.
    """

    def __init__(self, checkpoints: Checkpoints, *periods: int) -> None:
        self.checkpoints, self._periods = checkpoints, [period for period in periods if period]
        self.received, self._since, self._between, self._finished, self._process = 0, 0.0, False, False, os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopOnSignal:
        self.received, self._between, self._finished, self._process = 0, False, False, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def before_step(self) -> None:
        self._between = False

    def after_step(self) -> None:
        self.received = self._of_any_process()
        if self.received:
            self.checkpoints.save_now()
            self._leave()
        if any((self.trainer.iter + 1) % period == 0 for period in self._periods):
            self.checkpoints.prepare()
            self._between = True

    def _leave(self) -> None:
        logger.warning(
            "%s: stopped after iteration %d, with a checkpoint; --resume goes on from it. Exit code %d.",
            signal.Signals(self.received).name,
            self.trainer.iter,
            PREEMPTED,
        )
        raise SystemExit(PREEMPTED)

    def after_train(self) -> None:
        self._finished = self.trainer.iter >= self.trainer.max_iter - 1
        if self._finished and self.received:
            raise SystemExit(PREEMPTED)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # one that was forked off, such as a loading worker
            return
        if self.received:
            if time.monotonic() - self._since >= SAME_REQUEST:
                os._exit(128 + number)
            return
        self.received, self._since = number, time.monotonic()
        if self._finished:
            raise SystemExit(PREEMPTED)
        # Not through logging, which may be in the middle of a line.
        again = f"once more, after {SAME_REQUEST:g} seconds, to stop at once"
        os.write(2, f"{signal.Signals(number).name}: stopping after this iteration; {again}.\n".encode())
        if self._between and comm.is_main_process():
            self.checkpoints.save_prepared()
            if comm.get_world_size() == 1:
                self._leave()

    def _of_any_process(self) -> int:
        if comm.get_world_size() == 1:
            return self.received
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        number = torch.tensor(self.received, device=device)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        return int(number)


@contextlib.contextmanager
def exit_on_preemption() -> Iterator[None]:
    """Inside, until training catches them, SIGTERM and SIGUSR1 end the process at once with exit code 75: there is nothing to save yet.

    A run that is asked to stop while it starts would otherwise look like one that has failed. It does not wait to tell other processes,
    which notice.
    """
    own = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:  # not one that was forked off
            os.write(2, f"{signal.Signals(number).name}: stopped, not in training. Exit code {PREEMPTED}.\n".encode())
        os._exit(PREEMPTED)

    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is leave:
                signal.signal(number, handler)


@contextlib.contextmanager
def handed_on() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 go to the processes that this one has started, which it waits for: left to itself, it would end alone.

    Whoever starts a run knows the first of its processes, and stops that.
    """

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in multiprocessing.active_children():
            if process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
