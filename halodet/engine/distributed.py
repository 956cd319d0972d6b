"""What several processes need beyond Detectron2: DDP and SyncBN on the CPU too, equal statistics at evaluation, checks done once."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from halodet.errors import ConfigError

import torch
import torch.distributed as dist
from detectron2.engine import defaults
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import Tensor, nn

Value = TypeVar("Value")


class _NaiveSyncBatchNormAct(NaiveSyncBatchNorm):
    """NaiveSyncBatchNorm followed by what timm's SyncBatchNormAct has behind its own."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """On the CPU with several processes: Detectron2's NaiveSyncBatchNorm in place of PyTorch's SyncBatchNorm, which is for GPUs.

    Parameters, statistics and their names stay. Each process's statistics are weighted by its number of images, which gives those of all
    images together where their maps have one size; the running variance is the biased one.

    Returns:
        ``model``, changed in place.
    """
    for parent in list(model.modules()) if comm.get_world_size() > 1 else ():
        for name, norm in parent.named_children():
            if isinstance(norm, nn.SyncBatchNorm) and norm.weight.device.type == "cpu":
                setattr(parent, name, _naive(norm))
    return model


def _naive(norm: nn.SyncBatchNorm) -> NaiveSyncBatchNorm:
    with_act = hasattr(norm, "act") or hasattr(norm, "drop")
    naive = (_NaiveSyncBatchNormAct if with_act else NaiveSyncBatchNorm)(
        norm.num_features, eps=norm.eps, momentum=norm.momentum, stats_mode="N"
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(naive, name, getattr(norm, name))
    if with_act:
        naive.drop, naive.act = (getattr(norm, part, nn.Identity()) for part in ("drop", "act"))
    return naive.train(norm.training)


@contextmanager
def ddp_anywhere() -> Iterator[None]:
    """While Detectron2's DefaultTrainer is made: DistributedDataParallel for a model on the CPU as well.

    DefaultTrainer names the process's GPU to it, which DDP refuses for a model on the CPU, and has no argument to leave that out.
    """
    original = defaults.create_ddp_model

    def create(model: nn.Module, **options: Any) -> nn.Module:
        if next(model.parameters()).device.type == "cpu":
            options["device_ids"] = None
        return original(model, **options)

    defaults.create_ddp_model = create
    try:
        yield
    finally:
        defaults.create_ddp_model = original


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of rank 0, whose model is the one that is saved: plain batch norm's statistics differ between them."""
    if comm.get_world_size() > 1:
        with torch.no_grad():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def agree(work: Callable[[], Value], here: bool, errors: tuple[type[Exception], ...]) -> list[Value | None]:
    """Call ``work`` in those processes where ``here`` holds, while the others wait; all of them come together.

    Args:
        work: its value must be picklable.
        here: whether this process calls it.
        errors: kinds of a user's mistake, one of which in one process is raised in all.

    Returns:
        For each rank what ``work`` gave there, None where it was not called.
    """
    value, error = None, None
    if here:
        try:
            value = work()
        except errors as caught:
            error = caught
    outcomes = comm.all_gather((socket.gethostname(), value, type(error) if error else None, str(error)))
    for host, _, kind, message in outcomes:
        if kind:
            raise kind(message if host == outcomes[0][0] else f"on {host}: {message}") from error
    return [value for _, value, _, _ in outcomes]


def check_shared(files: Sequence[str | Path], wait_seconds: float = 30.0) -> None:
    """See that all machines of the run see the files that rank 0 does; all processes come together.

    Args:
        files: paths; one that rank 0 does not see, the others must not see either.
        wait_seconds: for a network file system to show what was just written.

    Raises:
        ConfigError: they do not.
    """

    def digests() -> list[str | None]:
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else None for file in files]

    wanted = agree(digests, comm.get_rank() == 0, (OSError,))[0]

    def compare() -> None:
        until = time.monotonic() + wait_seconds
        while (found := digests()) != wanted and time.monotonic() < until:
            time.sleep(0.5)
        if found != wanted:
            file = next(file for file, ours, theirs in zip(files, wanted, found, strict=True) if ours != theirs)
            raise ConfigError(
                f"{file} is not the file that rank 0 has there: set OUTPUT_DIR to a folder that all machines share"
            )

    agree(compare, comm.get_local_rank() == 0 and comm.get_rank() > 0, (ConfigError,))
