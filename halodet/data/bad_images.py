"""What training and evaluation had to leave out, counted and written to OUTPUT_DIR/skipped.json."""

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
SKIPPED_KEY = "skipped"  # in a sample: what was left out before, or in place of, this sample
MIN_SKIPPED = 10  # images below which the share says nothing


class TooManyBadImages(DatasetError):
    """So much of the data cannot be used that training must not go on; the message is one sentence."""

    def __init__(self, message: str) -> None:
        # A data loader's worker hands its traceback on as the message; the sentence stands at its end.
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, or one annotation of it.

    Attributes:
        file: path of the image.
        reason: what is wrong.
        annotation: which of the image's annotations, counted from 0; None for the whole image.
    """

    file: str
    reason: str
    annotation: int | None = None

    def __str__(self) -> str:
        return f"{self.file}{'' if self.annotation is None else f', annotation {self.annotation}'}: {self.reason}"


class SkipTrackingLoader:
    """A data loader whose samples are counted, and freed of what was noted in them about images left out.

    Args:
        loader: gives lists of samples.
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
        """End the loader's workers."""
        self.loader.close()

    def take(self) -> tuple[int, list[Skipped]]:
        """Images that came, usable or not, and what was left out, since the last call."""
        taken = self._seen, self._skipped
        self._seen, self._skipped = 0, []
        return taken


class BadImageReport:
    """The file ``skipped.json`` of a run; one process writes it.

    It holds ``images_seen`` and ``images_skipped`` of training, and three lists of objects with ``file``, ``reason`` and ``count`` (how
    often it was met): ``files``, images left out of training; ``annotations``, parts of images, with ``annotation``; and ``evaluation``,
    images that were evaluated as if nothing had been detected in them.

    Args:
        folder: OUTPUT_DIR of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / SKIPPED_FILE

    def read(self) -> dict[str, Any]:
        """What was written; an empty report where nothing was, or it cannot be read."""
        empty = {"images_seen": 0, "images_skipped": 0, "files": [], "annotations": [], "evaluation": []}
        try:
            content = json.loads(self.path.read_bytes())
            return {key: type(default)(content[key]) for key, default in empty.items()}
        except FileNotFoundError:
            return empty
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(f"{self.path} cannot be read and is begun anew ({error}).")
            return empty

    def add(self, seen: int, records: Iterable[Skipped], *, evaluation: bool = False) -> dict[str, Any]:
        """Count further records, name those that are new in the log, and return the whole report.

        Args:
            seen: images of training that came, those left out among them.
            records: what was left out.
            evaluation: it happened in an evaluation.

        Raises:
            OSError: the file cannot be written; the one before is left as it was.
        """
        content = self.read()
        content["images_seen"] += seen
        known = {
            key: {_identity(entry): entry for entry in content[key]} for key in ("files", "annotations", "evaluation")
        }
        for record in records:
            content["images_skipped"] += not evaluation and record.annotation is None
            key = "evaluation" if evaluation else "files" if record.annotation is None else "annotations"
            where = {} if record.annotation is None else {"annotation": record.annotation}
            entry = {"file": record.file, **where, "reason": record.reason, "count": 0}
            if _identity(entry) not in known[key]:
                logger.warning(f"Left out{' of the evaluation' if evaluation else ''}: {record}")
                known[key][_identity(entry)] = entry
                content[key].append(entry)
            known[key][_identity(entry)]["count"] += 1
        write_json(self.path, content)
        return content

    def training(self) -> dict[str, Any]:
        """What there is of training, for a checkpoint."""
        return {key: value for key, value in self.read().items() if key != "evaluation"}

    def seek(self, training: dict[str, Any]) -> None:
        """Put what a checkpoint holds of training in the place of what is written of it.

        Raises:
            OSError: the file cannot be written; the one before is left as it was.
        """
        write_json(self.path, {**self.read(), **training})

    def clear(self) -> None:
        """Forget what an earlier run left in the folder."""
        self.path.unlink(missing_ok=True)


def too_many(report: dict[str, Any], max_share: float) -> str | None:
    """The sentence training stops with, where ``report`` has more images left out than ``max_share`` of those seen."""
    seen, skipped = report["images_seen"], report["images_skipped"]
    if skipped < MIN_SKIPPED or skipped <= max_share * seen:
        return None
    first = report["files"][0]
    return (
        f"{skipped} of {seen} images could not be used, more than the share of {max_share:g} that DATALOADER.MAX_BAD_IMAGES allows "
        f"(the first is {first['file']}: {first['reason']}): mend the files that {SKIPPED_FILE} lists, or raise that key"
    )


def _identity(entry: dict[str, Any]) -> tuple[str, int | None]:
    return entry["file"], entry.get("annotation")
