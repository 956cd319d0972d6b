"""Interleaved timing of several implementations."""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from halodet.benchmark.gpu_timing import make_timer

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system.

    Otherwise implementations with large temporary tensors are measured with the page faults of every call: timm's halo
    attention then takes up to three times as long.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def compare(
    builders: Mapping[str, Callable[[], Callable[[], object]]],
    *,
    reference: str,
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    use_graph: bool = False,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time implementations in turns, so that other load on the machine affects all of them alike.

    Args:
        builders: name -> function that returns the call to time.
        reference: name of the implementation that ratios are relative to.
        rounds: number of timed calls of each implementation; on a GPU a round is the median of several calls.
        device: device of the calls. On a CPU the wall time is measured, on a GPU the time between two CUDA events.
        warmup: number of untimed calls before (compilation, autotuning, allocation).
        use_graph: on a GPU, time replays of a CUDA graph, which exclude the time that Python takes to launch kernels.
        on_round: called with the number of every finished round, 0 or less during warm-up.

    Returns:
        Name -> ``{"ms": median time, "ratio": median over rounds of time / time of the reference}``, the latter only
        if the reference did not fail; or ``{"failed": first line of the error}``. On a GPU ``"timing"`` names what is
        measured, and ``"not_captured"`` the reason if ``use_graph`` had no effect. Times that are not measured alike
        have no ratio.
    """
    timers: dict[str, Callable[[], float]] = {}
    notes: dict[str, dict[str, str]] = {name: {} for name in builders}
    failures: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    for i in range(1 - warmup, rounds + 1):
        for name, build in builders.items():
            if name in failures:
                continue
            try:
                if name not in timers:
                    timers[name], notes[name] = _make_timer(build(), device, use_graph)
                elapsed = timers[name]()
            except Exception as error:  # other implementations may raise anything; a failure is a result
                timers.pop(name, None)
                failures[name] = first_line(error)
                continue
            if i > 0:
                seconds[name].append(elapsed)
        if on_round:
            on_round(i)
    results: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        if name in failures:
            results[name] = {"failed": failures[name]}
            continue
        results[name] = {"ms": statistics.median(times) * 1e3, **notes[name]}
        alike = reference in notes and notes[name].get("timing") == notes[reference].get("timing")
        if seconds.get(reference) and reference not in failures and alike:
            results[name]["ratio"] = median_ratio(times, seconds[reference])
    return results


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def median_ratio(times: list[float], reference: list[float]) -> float:
    """Return the median over rounds of time / time of the reference."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive values."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _make_timer(
    call: Callable[[], object], device: torch.device, use_graph: bool
) -> tuple[Callable[[], float], dict[str, str]]:
    if device.type != "cuda":
        return lambda: _wall_seconds(call), {}
    timer, timing, reason = make_timer(call, device, use_graph)
    return timer, {"timing": timing, **({"not_captured": reason} if reason else {})}


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
