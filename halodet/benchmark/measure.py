"""Time, memory and the machine's own peak, measured so that contenders can be compared on a machine that does other things too."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# glibc gives blocks above a limit back to the system at every free, and gets them page by page again: what a contender costs then depends
# on whether its largest tensor lies above or below. With these limits every contender reuses its memory.
EVEN_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2 << 30)}


def use_even_allocator() -> None:
    """Start this program again with an allocator that treats all tensor sizes alike (glibc only; elsewhere nothing happens)."""
    if sys.platform == "linux" and any(name not in os.environ for name in EVEN_ALLOCATOR):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **EVEN_ALLOCATOR})


def release_memory() -> None:
    """Give what the allocator keeps for later back to the system (glibc only; elsewhere nothing happens)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that a clock read after it tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    calls: dict[str, Callable[[], object]], *, rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Time every call once a round, one after the other, so that what disturbs the machine disturbs all of them.

    Returns:
        Name -> seconds of each round; round i of one belongs with round i of another.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slower: list[float], faster: list[float]) -> float:
    """How many times as long the first took: the median over rounds."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values."""
    return math.exp(statistics.fmean(map(math.log, values)))


def peak_memory(build: Callable[..., Callable[[], object]], *arguments: object, device: torch.device) -> int | None:
    """Bytes that one call needs at its peak beyond what is held before it.

    Args:
        build: a function of a module (it may have to be sent to another process) that makes the call from ``arguments``.
        arguments: what it is given.
        device: on a GPU its allocator is asked; on the CPU a fresh process tells how far its memory grew (Linux).

    Returns:
        The bytes, or None where the system does not tell.
    """
    if device.type == "cuda":
        call = build(*arguments)
        call()  # compiles and tunes what is to be compiled and tuned
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    release_memory()  # the other process may need what this one does not use
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_growth, args=(sender, build, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(
            f"the process that was to measure memory ended with code {process.exitcode} before it told"
        ) from None
    finally:
        process.join()


def _growth(sender, build: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> None:
    call = build(*arguments)
    before = _status("VmRSS")
    call()
    sender.send(max(0, _status("VmHWM") - before))


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


@dataclass(frozen=True)
class Machine:
    """What a device reaches at best: operations per second in matrix products, bytes per second (read and written) in copies."""

    matrix_rate: float
    copy_rate: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the best of what PyTorch offers for matrix products (product, 1×1 convolution) and a copy that no cache holds."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    pixels = torch.randn(1, size, size // 32, 32, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    kernel = torch.randn(size, size, 1, 1, device=device, dtype=dtype)
    large = torch.empty(
        (2 << 30 if device.type == "cuda" else 256 << 20) // a.element_size(), device=device, dtype=dtype
    ).fill_(1)
    target = torch.empty_like(large)
    calls: dict[str, Callable[[], Tensor]] = {
        "product": lambda: a @ a,
        "convolution": lambda: F.conv2d(pixels, kernel),
        "copy": lambda: target.copy_(large),
    }
    with torch.no_grad():
        best = {name: min(seconds) for name, seconds in interleave(calls, rounds=10, device=device).items()}
    moved = 2 * large.numel() * large.element_size()
    return Machine(2 * size**3 / min(best["product"], best["convolution"]), moved / best["copy"])
