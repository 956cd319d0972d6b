"""Timing of calls on a GPU without the overhead of Python."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

GRAPH = "CUDA graph replay"
EVENTS = "CUDA events around the call"
REPETITIONS = 10  # per round
_WARMUP = 3  # calls before the capture: autotuning, compilation, allocation


@functools.cache
def _cache_sized_buffer(device: torch.device) -> torch.Tensor:
    # Overwriting it also takes as long as the launch of a graph, so that the GPU does not wait for the call.
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(2 * size, 256 << 20), dtype=torch.int8, device=device)


def flush_l2(device: torch.device) -> None:
    """Overwrite the L2 cache, so that a call does not find its inputs there."""
    _cache_sized_buffer(device).zero_()


def event_seconds(call: Callable[[], object], device: torch.device, repetitions: int = REPETITIONS) -> float:
    """Return the median time of a call between two CUDA events, with an empty L2 cache, in seconds.

    All repetitions are launched before the first is waited for. Where the launches of one call take longer than its
    kernels, the time includes gaps between the kernels.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    with torch.cuda.device(device):
        for start, end in events:
            flush_l2(device)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def capture(call: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Run a call on a side stream and capture it in a CUDA graph.

    Raises:
        RuntimeError: the call cannot be captured, for example because it waits for the GPU.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph


def make_timer(
    call: Callable[[], object], device: torch.device, use_graph: bool
) -> tuple[Callable[[], float], str, str | None]:
    """Return a function that measures a call once, what it measures, and why the call was not captured.

    Args:
        call: the call to time.
        device: its GPU.
        use_graph: capture the call if possible. The time of a replay is that of the kernels; small calls otherwise take
            as long as Python needs to launch them.
    """
    if not use_graph:
        return functools.partial(event_seconds, call, device), EVENTS, None
    call()  # an error of the call itself is not one of the capture
    try:
        graph = capture(call, device)
    except RuntimeError as error:
        torch.cuda.synchronize(device)  # raises if the error left the device unusable
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return functools.partial(event_seconds, call, device), EVENTS, reason
    return functools.partial(event_seconds, graph.replay, device), GRAPH, None
