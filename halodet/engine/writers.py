"""What is written about a run is not worth its end."""

from __future__ import annotations

import logging

from detectron2.utils.events import EventWriter

logger = logging.getLogger(__name__)


class IgnoreIOErrors(EventWriter):
    """Another writer, whose files may fail: training goes on, and what is new is tried again with the next writing.

    A disk that is full is reported by the next checkpoint, for which room can be made until then.

    Args:
        writer: Detectron2's of metrics.json, for example.
    """

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer
        self._told = False

    def write(self, **options: object) -> None:
        try:
            self.writer.write(**options)
        except OSError as error:
            self._tell(error)

    def close(self) -> None:
        try:
            self.writer.close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            name = type(self.writer).__name__
            logger.warning(
                f"{name} cannot write ({error.strerror or error}): training goes on, and what it writes is not complete."
            )
        self._told = True
