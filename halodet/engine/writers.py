"""Event writers: the progress line, Weights & Biases, and a wrapper that survives I/O errors."""

from __future__ import annotations

import logging
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter, get_event_storage

logger = logging.getLogger(__name__)


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's progress line, followed by the values of :class:`halodet.engine.hooks.Throughput`."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        super().__init__(max_iter, window_size)
        self.logger = _ThroughputAdapter(self.logger, {"window_size": window_size})


class _ThroughputAdapter(logging.LoggerAdapter):
    def process(self, msg: str, kwargs: Any) -> tuple[str, Any]:
        return f"{msg.rstrip()}  {throughput_line(get_event_storage(), self.extra['window_size'])}".rstrip(), kwargs


def throughput_line(storage: EventStorage, window_size: int) -> str:
    """Return for example ``images/s: 12.3  waiting for data: 4%  max_mem: 812M``, without missing values."""
    formats = {
        "images_per_second": "images/s: {:.4g}",
        "data_share": "waiting for data: {:.0%}",
        "memory_mib": "max_mem: {:.0f}M",
    }
    if torch.cuda.is_available():  # already in Detectron2's line
        del formats["memory_mib"]
    latest = storage.latest_with_smoothing_hint(window_size)
    return "  ".join(text.format(latest[key][0]) for key, text in formats.items() if key in latest)


class IgnoreIOErrors(EventWriter):
    """Writer wrapper that survives I/O errors.

    The first error is logged. The wrapped writer tries again at its next write, and a full disk ends the run at the
    next checkpoint.

    Args:
        writer: writer to wrap.
    """

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer
        self._warned = False

    def write(self) -> None:
        self._call(self.writer.write)

    def close(self) -> None:
        self._call(self.writer.close)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except OSError as error:
            if not self._warned:
                name, reason = type(self.writer).__name__, error.strerror or error
                logger.warning("%s cannot write (%s); training continues, its output is incomplete", name, reason)
            self._warned = True


class WandbWriter(EventWriter):
    """Write scalars and images to a Weights & Biases project.

    The run is named after its output folder, and resuming continues the same run. Without a network, set
    WANDB_MODE=offline and call ``wandb sync`` later.

    Args:
        output_dir: output folder of the run.
        project: name of the project.
        config: config to show with the run.
        window_size: number of iterations of the median that smooths scalars, as in metrics.json.
    """

    def __init__(self, output_dir: str, project: str, config: dict[str, Any], window_size: int = 20) -> None:
        import wandb

        self._wandb, self._window_size, self._last_write = wandb, window_size, -1
        output = Path(output_dir)
        id_file = output / "wandb_id.txt"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=output.resolve().name,
            dir=str(output),
            id=id_file.read_text().strip(),
            resume="allow",
            config=config,
        )

    def write(self) -> None:
        storage = get_event_storage()
        rows = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                rows[iteration][name] = value
        for name, image, iteration in storage._vis_data:  # TensorBoard's writer, which comes later, clears them
            rows[iteration][name] = self._wandb.Image(image.transpose(1, 2, 0))
        for iteration in sorted(rows):
            self._run.log(rows[iteration], step=iteration)
            self._last_write = max(self._last_write, iteration)

    def close(self) -> None:
        self._run.finish()
