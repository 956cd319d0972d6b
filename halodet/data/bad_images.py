"""Counts the images and annotations that training and evaluation skip, and lists them in OUTPUT_DIR/skipped.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halodet.errors import DatasetError
from halodet.utils.io import write_json

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.json"
SKIPPED_KEY = "skipped"  # in a sample: what was skipped before, or in place of, this sample
MIN_SKIPPED = 10  # with fewer skipped images, their fraction means little


class TooManyBadImages(DatasetError):
    """Too many images cannot be used for training to continue."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker re-raises with its traceback as the message, whose last line is the original message.
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])


@dataclass(frozen=True)
class Skipped:
    """A skipped image or annotation.

    Attributes:
        file: path of the image.
        reason: why it was skipped.
        annotation: index of the skipped annotation, counted from 0; None for the whole image.
    """

    file: str
    reason: str
    annotation: int | None = None

    def __str__(self) -> str:
        return f"{self.file}{'' if self.annotation is None else f', annotation {self.annotation}'}: {self.reason}"


class SkipTrackingLoader:
    """Data loader wrapper that counts samples and collects the skipped images noted in them.

    Args:
        loader: iterable of lists of samples.
    """

    def __init__(self, loader: Iterable[list[dict[str, Any]]]) -> None:
        self.loader = loader
        self._seen, self._skipped = 0, []

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            found = [record for sample in batch for record in sample.pop(SKIPPED_KEY, ())]
            self._seen += len(batch) + sum(record.annotation is None for record in found)
            self._skipped += found
            yield batch

    def close(self) -> None:
        """Stop the loader's workers."""
        self.loader.close()

    def drain(self) -> tuple[int, list[Skipped]]:
        """Return the number of images seen, skipped ones included, and what was skipped, since the last call."""
        drained = self._seen, self._skipped
        self._seen, self._skipped = 0, []
        return drained


class BadImageReport:
    """The file ``skipped.json`` of a run, written by the main process.

    ``images_seen`` and ``images_skipped`` count training images. The lists ``files`` (images skipped in training),
    ``annotations`` (annotations skipped in training) and ``evaluation`` (images evaluated as if nothing had been
    detected in them) hold objects with ``file``, ``reason``, ``count`` and, for annotations, ``annotation``.

    Args:
        folder: OUTPUT_DIR of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / SKIPPED_FILE

    def read(self) -> dict[str, Any]:
        """Return the contents of the file; an empty report if it is missing or unreadable."""
        empty = {"images_seen": 0, "images_skipped": 0, "files": [], "annotations": [], "evaluation": []}
        try:
            content = json.loads(self.path.read_bytes())
            return {key: type(default)(content[key]) for key, default in empty.items()}
        except FileNotFoundError:
            return empty
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is unreadable; starting a new report (%s).", self.path, error)
            return empty

    def add(self, seen: int, records: Iterable[Skipped], *, evaluation: bool = False) -> dict[str, Any]:
        """Add skipped images, log the new ones, and return the whole report.

        Args:
            seen: number of training images seen, skipped ones included.
            records: skipped images and annotations.
            evaluation: whether they were skipped in an evaluation.

        Raises:
            OSError: the file cannot be written; its previous version is unchanged.
        """
        content = self.read()
        content["images_seen"] += seen
        known = {
            key: {_identity(entry): entry for entry in content[key]} for key in ("files", "annotations", "evaluation")
        }
        for record in records:
            content["images_skipped"] += not evaluation and record.annotation is None
            key = "evaluation" if evaluation else "files" if record.annotation is None else "annotations"
            index = {} if record.annotation is None else {"annotation": record.annotation}
            entry = {"file": record.file, **index, "reason": record.reason, "count": 0}
            if _identity(entry) not in known[key]:
                logger.warning("Skipped in %s: %s", "evaluation" if evaluation else "training", record)
                known[key][_identity(entry)] = entry
                content[key].append(entry)
            known[key][_identity(entry)]["count"] += 1
        write_json(self.path, content)
        return content

    def training_state(self) -> dict[str, Any]:
        """Return the training part of the report, for a checkpoint."""
        return {key: value for key, value in self.read().items() if key != "evaluation"}

    def restore(self, training_state: dict[str, Any]) -> None:
        """Replace the training part of the report by the state of a checkpoint.

        Raises:
            OSError: the file cannot be written; its previous version is unchanged.
        """
        write_json(self.path, {**self.read(), **training_state})

    def clear(self) -> None:
        """Delete the report of an earlier run in the same folder."""
        self.path.unlink(missing_ok=True)


def too_many(report: dict[str, Any], max_fraction: float) -> str | None:
    """Return an error message if more than ``max_fraction`` of the images of ``report`` were skipped, else None."""
    seen, skipped = report["images_seen"], report["images_skipped"]
    if skipped < MIN_SKIPPED or skipped <= max_fraction * seen:
        return None
    first = report["files"][0]
    return (
        f"{skipped} of {seen} images could not be used, which exceeds DATALOADER.MAX_BAD_IMAGES={max_fraction:g} "
        f"(first: {first['file']}: {first['reason']}). Fix: repair the files in {SKIPPED_FILE} or raise the limit."
    )


def _identity(entry: dict[str, Any]) -> tuple[str, int | None]:
    return entry["file"], entry.get("annotation")
