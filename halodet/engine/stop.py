"""How training ends when it cannot go on: with one sentence, and an exit code that tells why."""

from __future__ import annotations

import logging

from halodet.errors import DatasetError, TrainingStopped


def log_sentences_only() -> None:
    """Let Detectron2's loop log what one sentence says without a traceback, which is for mistakes of the program."""
    loop = logging.getLogger("detectron2.engine.train_loop")
    if _without_traceback not in loop.filters:
        loop.addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], TrainingStopped | DatasetError):
        record.exc_info, record.msg = None, "Training stops."  # whoever catches it says why
    return True
