"""Where the processes of a run find each other: a store that has nothing in it from an earlier start."""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_TURN_SECONDS, _LAST_SECONDS = 0.05, 10.0


def meet(rank: int, size: int, place: Any, timeout: timedelta) -> tuple[dist.Store, list[Any]]:
    """Meet the other processes at MASTER_ADDR and MASTER_PORT.

    torchrun keeps one store for all its restarts of a run. What an earlier start left in it, addresses of its processes among it, must not
    be taken for what this one writes, and nothing that torchrun tells is new with each start on all machines. So rank 0 makes up a name,
    and tells it to each process that asks with a name of its own.

    Args:
        rank: of this process.
        size: number of processes.
        place: what this process tells the others; json can write it.
        timeout: how long to wait for the others.

    Returns:
        A store of this start alone, and what each rank told.

    Raises:
        torch.distributed.DistError: they do not come.
    """
    shared, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    shared.set_timeout(timeout)
    shared = dist.PrefixStore("halodet", shared)
    name = uuid.uuid4().hex
    if rank > 0:
        shared.set(f"asks/{rank}", name)
        name = shared.get(f"answer/{name}").decode()
    own = dist.PrefixStore(name, shared)
    own.set(f"place/{rank}", json.dumps(place))
    if rank == 0:
        _tell(name, shared, own, size, timeout)
    places = [json.loads(own.get(f"place/{other}")) for other in range(size)]
    own.add("read", 1)
    until = time.monotonic() + _LAST_SECONDS
    while rank == 0 and own.add("read", 0) < size and time.monotonic() < until:  # the store can end with this process
        time.sleep(_TURN_SECONDS)
    return own, places


def _tell(name: str, shared: dist.Store, own: dist.Store, size: int, timeout: timedelta) -> None:
    """On rank 0: answer until all have come; an earlier start's question is answered as well, and the answer never read."""
    missing, until = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if own.check([f"place/{rank}"]):
                missing.discard(rank)
            elif shared.check([f"asks/{rank}"]):
                shared.set(f"answer/{shared.get(f'asks/{rank}').decode()}", name)
        if missing and time.monotonic() > until:
            raise dist.DistStoreError(
                f"{size - len(missing)} of {size} came, not rank {', '.join(map(str, sorted(missing)[:8]))}"
            )
        time.sleep(_TURN_SECONDS)
