"""Find the latest readable checkpoint of a run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from halodet.checkpoint.io import LoadedCheckpoint, read_checkpoint
from halodet.errors import CheckpointError

logger = logging.getLogger(__name__)

TAG = "last_checkpoint"
RUN_STATE = "ResumeState"  # name of the hook whose state holds the start time of the run
_NAME = re.compile(r"model_(\d+|final)\.pth")


def latest_checkpoint(folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> LoadedCheckpoint | None:
    """Read the latest checkpoint in ``folder`` that is complete: model, optimizer and iteration.

    The candidates are ``model_0000123.pth``, ``model_final.pth`` and the file that the tag ``last_checkpoint`` names.
    If the tagged file is readable, only files of later iterations are read besides it: a killed run may not have
    written its tag. Of two runs in one folder, the one that started later wins. Unreadable files are logged.

    Returns:
        The checkpoint, or None if the folder has neither checkpoints nor a tag.

    Raises:
        CheckpointError: none of the checkpoints is usable.
    """
    folder = Path(folder)
    tag = _read_tag(folder)
    broken: dict[str, str] = {}
    best = _read(folder / tag, broken, allow_pickle) if tag and (folder / tag).is_file() else None
    tagged = best.checkpoint["trainer"]["iteration"] if best else -1
    for name, iteration in _names(folder):
        if name == tag or (iteration is not None and iteration <= tagged):
            continue
        found = _read(folder / name, broken, allow_pickle)
        if found is not None and (best is None or _age(found) > _age(best)):
            best = found
    if best is None:
        if tag is None and not broken:
            return None
        reasons = "; ".join(broken.values()) or f"{folder / TAG} names {tag or 'nothing'}, which does not exist"
        raise CheckpointError(
            f"OUTPUT_DIR={folder} has no checkpoint to resume from ({reasons}). Fix: restore one, or start "
            "without --resume."
        )
    name = os.path.basename(best.path)
    for reason in broken.values():
        logger.warning("Skipped unusable checkpoint: %s Resuming from %s.", reason, name)
    if tag is not None and name != tag and tag not in broken:
        logger.warning("%s names %r, but the latest checkpoint is %s. Resuming from it.", folder / TAG, tag, name)
    return best


def numbered(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the checkpoints ``model_0000123.pth`` in ``folder``, latest first."""
    return [name for name, iteration in _names(Path(folder)) if iteration is not None]


def _names(folder: Path) -> Iterator[tuple[str, int | None]]:
    """Yield names of checkpoints and their iterations, latest first; None for that of ``model_final.pth``."""
    found = [(match[0], match[1]) for path in folder.glob("model_*.pth") if (match := _NAME.fullmatch(path.name))]
    iterations = {name: None if number == "final" else int(number) for name, number in found}
    yield from sorted(iterations.items(), key=lambda item: float("inf") if item[1] is None else item[1], reverse=True)


def _read_tag(folder: Path) -> str | None:
    try:
        return (folder / TAG).read_text(encoding="utf-8", errors="replace").strip("\0 \r\n\t")
    except OSError:
        return None


def _read(path: Path, broken: dict[str, str], allow_pickle: bool) -> LoadedCheckpoint | None:
    try:
        checkpoint = read_checkpoint(path, allow_pickle=allow_pickle)
    except (CheckpointError, OSError) as error:
        broken[path.name] = str(error)
        return None
    trainer = checkpoint.get("trainer")
    if (
        not isinstance(trainer, Mapping)
        or not isinstance(trainer.get("iteration"), int)
        or "optimizer" not in trainer.get("_trainer", trainer)  # of DefaultTrainer, of SimpleTrainer
    ):
        broken[path.name] = f"{path} has weights, but no iteration and optimizer state."
        return None
    return LoadedCheckpoint(str(path), checkpoint, latest=True)


def _age(loaded: LoadedCheckpoint) -> tuple[float, int]:
    """Return the start time of the run in seconds since 1970 (0 if unknown), then the iteration."""
    trainer = loaded.checkpoint["trainer"]
    return float(trainer.get("hooks", {}).get(RUN_STATE, {}).get("started", 0.0)), trainer["iteration"]
