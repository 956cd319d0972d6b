"""Multi-process runs: the launcher's environment, the process group, and what Detectron2 lacks on the CPU."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from halodet.errors import ConfigError, HalodetError

import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import Tensor, nn

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_exit_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class DistEnv:
    """Place of this process among those that torchrun or srun started; the local ones are those of this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def detect_dist_env(environ: MutableMapping[str, str] = os.environ) -> DistEnv | None:
    """Return the place that torchrun's or srun's variables give this process; None for a single process.

    srun's variables are added to ``environ`` under torchrun's names, which PyTorch reads.

    Raises:
        ConfigError: a variable is missing or is not a number, or srun placed unequal numbers of tasks on the nodes.
    """
    try:
        if not {"RANK", "WORLD_SIZE"} <= set(environ):
            environ.update(_slurm_env(environ))
        if int(environ.get("WORLD_SIZE", "1")) == 1:
            return None
        rank, world_size, local_rank, local_world_size, *_ = (environ[name] for name in _TORCHRUN)
        env = DistEnv(int(rank), int(world_size), int(local_rank), int(local_world_size))
        if not (0 <= env.rank < env.world_size and 0 <= env.local_rank < env.local_world_size):
            raise ValueError(env)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"The launcher's environment is invalid ({type(error).__name__}: {error}): expected "
            f"{', '.join(_TORCHRUN)}. Fix: start the processes with torchrun or srun."
        ) from error
    return env


def _slurm_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Translate the variables of an srun step to torchrun's; empty outside of steps with several tasks."""
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    tasks = set(re.findall(r"(?:^|,)(\d+)", environ["SLURM_STEP_TASKS_PER_NODE"]))  # 4(x2),3
    if len(tasks) != 1:
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']}, add --ntasks-per-node")
    port = 20000 + int(environ["SLURM_JOB_ID"]) % 1000 * 10 + int(environ.get("SLURM_STEP_ID", "0")) % 10
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks.pop(),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)


def init_distributed(env: DistEnv, timeout: timedelta) -> None:
    """Join the process group (NCCL for CUDA tensors, gloo for CPU tensors) and create Detectron2's local group.

    Args:
        env: place of this process.
        timeout: limit of the rendezvous and of each collective.

    Raises:
        ConfigError: the rendezvous failed, or the machines run different numbers of processes.
    """
    restarts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS")
    if env.rank == 0 and restarts not in (False, None, "0"):
        logger.warning(
            "torchrun --max-restarts may reuse addresses of dead ranks; set %s=1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
        )
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    except (RuntimeError, OSError) as error:
        fix = "set MASTER_PORT to a free port" if "EADDRINUSE" in str(error) else "check that each machine can reach it"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"Rendezvous at {address} failed (expected {env.world_size} ranks within {timeout}): {reason}. Fix: {fix}."
        ) from error
    sizes = comm.all_gather(env.local_world_size)
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={sizes} is invalid: expected the same number of processes on each machine."
        )
    if env.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(env.local_rank)
    comm.create_local_process_group(env.local_world_size)


def create_exit_group() -> None:
    """Create the group of :func:`wait_for_all_ranks`; called by all ranks together."""
    global _exit_group
    _exit_group = dist.new_group(backend="gloo") if comm.get_world_size() > 1 else None


def wait_for_all_ranks(seconds: float = 5.0) -> bool:
    """Return whether all ranks call this within ``seconds`` of each other."""
    if _exit_group is None:
        return comm.get_world_size() == 1
    try:
        dist.monitored_barrier(_exit_group, timeout=timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


def run_and_broadcast_errors(work: Callable[[], Value], on_this_rank: bool = True) -> list[Value | None]:
    """Call ``work`` on some ranks while the others wait; an expected error of one rank is raised on all of them.

    Args:
        work: function without arguments whose result can be pickled.
        on_this_rank: whether this rank calls it.

    Returns:
        The result of each rank, None where ``work`` was not called.
    """
    value, error = None, None
    if on_this_rank:
        try:
            value = work()
        except HalodetError as caught:
            error = caught
    outcomes = comm.all_gather((socket.gethostname(), value, type(error) if error else None, str(error)))
    for host, _, kind, message in outcomes:
        if kind:
            raise kind(message if host == outcomes[0][0] else f"{host}: {message}") from error
    return [value for _, value, _, _ in outcomes]


def check_shared(files: Sequence[str | Path], wait_seconds: float = 30.0) -> None:
    """Check that all ranks see the same files; called by all ranks together.

    Args:
        files: paths; a file that one rank does not have must be absent everywhere.
        wait_seconds: time for a network file system to show what was just written.

    Raises:
        ConfigError: a file differs.
    """

    def digest(file: str | Path) -> str | None:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else None

    until = time.monotonic() + wait_seconds
    while True:
        late = time.monotonic() > until
        ranks = comm.all_gather([digest(file) for file in files])
        different = [
            str(file) for file, found in zip(files, zip(*ranks, strict=True), strict=True) if len(set(found)) > 1
        ]
        if not different:
            return
        if comm.all_gather(late)[0]:
            raise ConfigError(
                f"{different[0]} is not visible on all ranks. Fix: set OUTPUT_DIR to a shared file system."
            )
        time.sleep(0.5)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0, whose model is saved, to all ranks: running statistics of plain batch norm differ."""
    if comm.get_world_size() > 1:
        with torch.no_grad():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


class _NaiveSyncBatchNormAct(NaiveSyncBatchNorm):
    """NaiveSyncBatchNorm followed by the drop and act layers of timm's SyncBatchNormAct."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace SyncBatchNorm, which needs a GPU, by Detectron2's NaiveSyncBatchNorm in a multi-process run on the CPU.

    Parameters, buffers and their names stay. Statistics of the ranks are weighted by their numbers of images.

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
