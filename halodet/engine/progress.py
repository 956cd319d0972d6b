"""What a person watching a run wants to see in the log line: images per second, waiting for data, memory."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter, EventStorage, get_event_storage


class Throughput(HookBase):
    """Put images_per_second, data_share and memory_mib beside Detectron2's time and data_time.

    data_share is the part of an iteration, 0 to 1, in which the slowest process waited for images; memory_mib is the most that the first
    process has used so far, of its GPU or, without one, of the computer.

    Args:
        images: images in an iteration, of all processes together.
    """

    def __init__(self, images: int) -> None:
        self._images = images

    def after_step(self) -> None:
        storage, latest = self.trainer.storage, self.trainer.storage.latest()
        seconds, at = latest.get("time", (0.0, -1))
        if at == self.trainer.iter and seconds > 0:  # Detectron2 does not time the first iterations
            storage.put_scalar("images_per_second", self._images / seconds)
            if "data_time" in latest:
                storage.put_scalar("data_share", min(latest["data_time"][0] / seconds, 1.0))
        memory = peak_memory()
        if memory is not None:
            storage.put_scalar("memory_mib", memory, smoothing_hint=False)


def peak_memory() -> float | None:
    """Most MiB of the GPU that PyTorch had allocated, or that the process had of the computer's memory; None where nobody counts it."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's line, with what :class:`Throughput` measured at its end."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        super().__init__(max_iter, window_size)
        self.logger = _Longer(self.logger, {"window_size": window_size})


class _Longer(logging.LoggerAdapter):
    def process(self, msg: str, kwargs: Any) -> tuple[str, Any]:
        return f"{msg.rstrip()}  {throughput_line(get_event_storage(), self.extra['window_size'])}".rstrip(), kwargs


def throughput_line(storage: EventStorage, window_size: int) -> str:
    """For example ``images/s: 12.3  waiting for data: 4 %  max_mem: 812M``, without what was not measured."""
    latest = storage.latest_with_smoothing_hint(window_size)
    texts = {
        "images_per_second": "images/s: {:.4g}",
        "data_share": "waiting for data: {:.0%}",
        "memory_mib": "max_mem: {:.0f}M",
    }
    if torch.cuda.is_available():  # the GPU's is in Detectron2's line already
        del texts["memory_mib"]
    return "  ".join(text.format(latest[key][0]) for key, text in texts.items() if key in latest)
