"""What the items of a step share: device, time left, and what replaces a GPU in a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from halodet.benchmark.gpu_timing import make_timer

import torch


class Skipped(Exception):
    """An item that does not apply to this machine; the message is the reason."""


@dataclass
class Context:
    """Options of a step.

    Args:
        dry_run: run tiny sizes on the CPU, the kernels in Triton's interpreter.
        output: folder for logs and results.
        deadline: time of ``time.monotonic()`` at which no further item starts.
        stand_ins: what a dry run replaced, for the report.
    """

    dry_run: bool
    output: Path
    deadline: float
    stand_ins: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return torch.device("cpu" if self.dry_run else "cuda")

    def time_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def replace(self, text: str) -> None:
        """Record what a dry run replaces by what."""
        if text not in self.stand_ins:
            self.stand_ins.append(text)

    def synchronize(self) -> None:
        """Wait for the GPU; raises the errors of its kernels."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> tuple[float, str]:
        """Return the median GPU time of a call in seconds, and what is measured; in a dry run the wall time."""
        if not self.dry_run:
            timer, timing, _ = make_timer(call, self.device, use_graph=True)
            return timer(), timing
        self.replace("CUDA graph replay: wall time of one call")
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, "wall time"
