"""Start a run's processes, or join those that torchrun or Slurm has started."""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlparse

from halodet.engine.lifeline import Lifeline, end, finish_undisturbed, is_network_error
from halodet.engine.meeting import meet
from halodet.errors import ConfigError

import torch
import torch.distributed as dist
from detectron2.utils import comm

logger = logging.getLogger(__name__)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FLAGS = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0}
_LEAVE_SECONDS = 5.0  # in which processes that were asked to stop leave together
_PROBLEM_WAIT = timedelta(minutes=1)  # for the others to come, who are to be told of one


@dataclass(frozen=True)
class DistEnv:
    """A process's place among those that torchrun or Slurm has started.

    Attributes:
        source: ``"torchrun"`` or ``"Slurm"``.
        rank: of this process, from 0.
        size: number of processes, on all machines.
        local_rank: of this process on its machine, from 0; the number of its GPU.
        local_size: number of processes on this machine.
        host: address of the machine of rank 0.
        port: on it, where the processes meet.
    """

    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int


def detect_dist_env(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> DistEnv | None:
    """The place that torchrun's or Slurm's environment gives this process; None where there is neither, or one process only.

    torchrun's variables come first, as torchrun can be what a Slurm job runs. Of Slurm's those of the step (``srun``) come before those
    of the job. MASTER_ADDR and MASTER_PORT, where they are set, are used under Slurm too; else the processes meet on the first machine of
    the list, at a port from 20000 to 29999 that follows from the numbers of job and step.

    Args:
        args: of Detectron2's parser; flags that are not at their defaults must say what the environment says.

    Raises:
        ConfigError: the environment is not complete, or a flag contradicts it.
    """
    world = _from_torchrun(environ, args) or _from_slurm(environ, args)
    if world is None or world.size == 1:
        return None
    where = f"{world.source} has started {world.size} processes, {world.local_size} of them on {socket.gethostname()}"
    if (
        not 0 <= world.local_rank < world.local_size
        or not 0 <= world.rank < world.size
        or world.size % world.local_size
    ):
        raise ConfigError(
            f"{where}, and this one has rank {world.rank} and local rank {world.local_rank}: "
            "start the same number on each machine, and let ranks count from 0"
        )
    told = {
        "num_gpus": world.local_size,
        "num_machines": world.size // world.local_size,
        "machine_rank": world.rank // world.local_size,
    }
    for flag, default in _FLAGS.items():
        if getattr(args, flag) not in (default, told[flag]):
            name = flag.replace("_", "-")
            raise ConfigError(
                f"--{name} is {getattr(args, flag)}, but {where}, which makes it {told[flag]}: leave --{name} out"
            )
    return world


def _from_torchrun(environ: Mapping[str, str], args: argparse.Namespace) -> DistEnv | None:
    there = [name for name in _TORCHRUN if name in environ]
    by_flags = any(getattr(args, flag) != default for flag, default in _FLAGS.items())
    if not {"RANK", "WORLD_SIZE"} <= set(there) or (by_flags and len(there) < len(_TORCHRUN)):
        return None  # some clusters set a few of them for their own use, and flags then say what is meant
    if len(there) < len(_TORCHRUN):
        missing = ", ".join(name for name in _TORCHRUN if name not in environ)
        raise ConfigError(
            f"the environment has {', '.join(there)}, but not {missing}, which torchrun sets too: start the run with torchrun"
        )
    rank, size, local_rank, local_size = (_number(environ, name) for name in _TORCHRUN[:4])
    return DistEnv(
        "torchrun", rank, size, local_rank, local_size, environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    )


def _from_slurm(environ: Mapping[str, str], args: argparse.Namespace) -> DistEnv | None:
    # A batch script has SLURM_NTASKS and SLURM_PROCID as well; only what srun starts has the variables of a step.
    size_name = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environ), None)
    if size_name is None or "SLURM_PROCID" not in environ or _number(environ, size_name) == 1:
        return None
    if size_name == "SLURM_NTASKS" and any(getattr(args, flag) != default for flag, default in _FLAGS.items()):
        return None
    if (
        size_name == "SLURM_NTASKS"
        and environ["SLURM_PROCID"] == "0"
        and not {"SLURM_STEP_ID", "SLURM_STEPID"} & set(environ)
    ):
        raise ConfigError(
            f"the Slurm job has {environ[size_name]} tasks, but its batch script has started this process without srun, and alone: "
            "write srun before the command (srun --ntasks=1 for one process), or use torchrun"
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    missing = [name for name in ("SLURM_LOCALID", "SLURM_JOB_ID") if name not in environ] + (
        [] if nodes else ["SLURM_JOB_NODELIST"]
    )
    if missing:
        raise ConfigError(
            f"{size_name} is {environ[size_name]}, but {', '.join(missing)} is not set: start the run with srun, or torchrun"
        )
    size, rank = _number(environ, size_name), _number(environ, "SLURM_PROCID")
    port = 20000 + _number(environ, "SLURM_JOB_ID") % 1000 * 10 + int(environ.get("SLURM_STEP_ID", "0")) % 10
    return DistEnv(
        "Slurm",
        rank,
        size,
        _number(environ, "SLURM_LOCALID"),
        _slurm_local_size(environ, size, nodes),
        environ.get("MASTER_ADDR") or first_host(nodes),
        _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port,
    )


def _slurm_local_size(environ: Mapping[str, str], size: int, nodes: str) -> int:
    """Processes on each machine, from a list like ``4(x2)``; Slurm may also have spread them unevenly."""
    spread = (
        environ.get("SLURM_STEP_TASKS_PER_NODE")
        or environ.get("SLURM_TASKS_PER_NODE")
        or environ.get("SLURM_NTASKS_PER_NODE")
    )
    if not spread:
        count = _number(environ, "SLURM_JOB_NUM_NODES") if "SLURM_JOB_NUM_NODES" in environ else 1
        return size // max(count, 1)
    counts = {int(count) for count in re.findall(r"(?:^|,)(\d+)", spread)}
    if len(counts) != 1:
        raise ConfigError(
            f"Slurm has spread {size} processes unevenly over {nodes} ({spread}): add --ntasks-per-node to srun"
        )
    return min(counts.pop(), size)


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodes)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"the environment's {name} is {environ[name]!r}, expected a whole number") from None


def join(world: DistEnv, device: str, timeout: timedelta, *, problem: str = "") -> None:
    """Make this process one of the run's: NCCL's process group for GPUs, gloo's for the CPU, and Detectron2's group of a machine.

    Args:
        world: this process's place.
        device: ``cfg.MODEL.DEVICE``.
        timeout: how long to wait for the other processes, here and whenever they exchange something.
        problem: why this process cannot take part; raised here, and in the others, which would wait for it.

    Raises:
        ConfigError: the others do not come, one has a problem, or runs on another kind of device.
    """
    os.environ.update(
        MASTER_ADDR=world.host,
        MASTER_PORT=str(world.port),
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
    )
    kind, gpus, here = torch.device(device).type, torch.cuda.device_count(), socket.gethostname()
    if kind == "cuda" and world.local_size > gpus and not problem:
        problem = (
            f"{here} has {gpus} GPUs for {world.local_size} processes: start as many as it has, or add MODEL.DEVICE cpu"
        )
    logger.info(f"{world.source}: rank {world.rank} of {world.size}, meeting at {world.host}:{world.port}")
    place = [kind, here, world.local_size, problem]
    try:
        store, places = meet(world.rank, world.size, place, min(timeout, _PROBLEM_WAIT) if problem else timeout)
    except (RuntimeError, OSError) as error:  # older versions of PyTorch have no kind of their own for some of them
        if problem:
            raise ConfigError(problem) from error
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {world.port} of {here} is in use by another program: set MASTER_PORT to a free one"
            ) from error
        raise ConfigError(
            f"not all of {world.source}'s {world.size} processes met at {world.host}:{world.port} within {timeout.total_seconds() / 60:g} "
            f"minutes ({_first_line(error)}): see that srun or torchrun starts all of them, and that each machine can reach that port"
        ) from error
    if problem:
        raise ConfigError(problem)
    kind_0, host_0, size_0, _ = places[0]
    for rank, (other, host, local_size, their_problem) in enumerate(places):
        if their_problem:
            raise ConfigError(their_problem if host == here else f"on {host}: {their_problem}")
        if other != kind_0:
            raise ConfigError(
                f"rank {rank} on {host} runs on {other}, but rank 0 on {host_0} on {kind_0}: set MODEL.DEVICE"
            )
        if local_size != size_0:
            raise ConfigError(
                f"{host} has {local_size} processes and {host_0} has {size_0}: start the same number on each machine"
            )
    if kind == "cuda":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    comm.create_local_process_group(world.local_size)
    comm.synchronize()


def supervise(work: Callable[[], object], host: str, exit_codes: Mapping[type[Exception], int]) -> int:
    """Call ``work`` in this process of the run, with a :class:`Lifeline` to the others where there are any.

    Args:
        work: what each process does.
        host: address of the machine of rank 0.
        exit_codes: kinds of errors that a sentence tells all of, with the exit code of each.

    Returns:
        The exit code. Another process's end ends this one with :data:`EXIT_RANK_LOST`; any other error is raised, once the others know.
    """
    lifeline = Lifeline(host) if comm.get_world_size() > 1 else None
    try:
        work()
    except SystemExit:
        if lifeline:
            finish_undisturbed()
            lifeline.close(seconds=_LEAVE_SECONDS)
        raise
    except BaseException as error:
        if lifeline:
            finish_undisturbed()
        code = next(
            (getattr(error, "exit_code", code) for kind, code in exit_codes.items() if isinstance(error, kind)), None
        )
        text = str(error) if code is not None else f"{type(error).__name__}: {error}"
        first = lifeline.failed(text, network=is_network_error(error)) if lifeline else None
        if first:
            end(first)
        if code is None:
            raise
        logger.error(text)
        return code
    if lifeline:
        lifeline.close()
        dist.destroy_process_group()
    return 0


def host_of(dist_url: str) -> str:
    """The machine of rank 0 in Detectron2's ``--dist-url``; this one where it names none."""
    return urlparse(dist_url).hostname or socket.gethostname()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
