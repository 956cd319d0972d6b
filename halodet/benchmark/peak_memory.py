"""Peak memory of a call, on a GPU or in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from halodet.benchmark.measure import first_line

import torch


def peak_memory(build: Callable[..., Callable[[], object]], *arguments: object, device: torch.device) -> dict[str, Any]:
    """Measure the peak memory of one call beyond what is allocated before it.

    Args:
        build: picklable function that returns the call.
        arguments: arguments of ``build``.
        device: on a GPU the allocator is queried; on the CPU (Linux) the call runs in a new process.

    Returns:
        ``{"peak_mib": MiB}``, ``{"failed": reason}``, or ``{}`` where the system does not report it.
    """
    try:
        if device.type == "cuda":
            return {"peak_mib": peak_of_second_call(build(*arguments), CudaAllocator(device)) / 2**20}
        return {"peak_mib": _process_peak(build, arguments) / 2**20} if sys.platform == "linux" else {}
    except Exception as error:  # other implementations may raise anything; a failure is a result
        return {"failed": first_line(error)}


class Allocator(Protocol):
    """Statistics of a memory allocator in bytes."""

    def allocated(self) -> int:
        """Return the allocated memory."""

    def reset_peak(self) -> None:
        """Start a new maximum."""

    def peak(self) -> int:
        """Return the maximum of the allocated memory."""


class CudaAllocator:
    """PyTorch's allocator of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocated(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def peak_of_second_call(call: Callable[[], object], allocator: Allocator) -> int:
    """Return the peak memory of the second call, in bytes, beyond what is allocated before it.

    What the first call leaves allocated (caches, workspaces) does not count. Calls must therefore free their gradients,
    as a training step does that sets them to None: gradients that exist before the call would not count either.
    """
    call()
    before = allocator.allocated()
    allocator.reset_peak()
    call()
    return allocator.peak() - before


def _process_peak(build: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, build, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that measures memory ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def _send_peak(sender: Connection, build: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> None:
    call = build(*arguments)
    before = _status_bytes("VmRSS")
    call()
    sender.send(max(0, _status_bytes("VmHWM") - before))


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
