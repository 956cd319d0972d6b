"""Which checkpoint of a folder a run goes on from: the newest that can be read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halodet.checkpoint.io import read_checkpoint
from halodet.errors import CheckpointError

logger = logging.getLogger(__name__)

TAG = "last_checkpoint"
RUN_STATE = "RunState"  # the hook that tells, among a checkpoint's hooks, when its run was started
_NAME = re.compile(r"model_(\d+|final)\.pth")


@dataclass(frozen=True)
class Found:
    """A checkpoint of a run, and what was read of it."""

    path: str
    checkpoint: dict[str, Any]

    @property
    def age(self) -> tuple[float, int]:
        """What is newer is larger: when the run was started (seconds since 1970; 0 where the file does not say), then its iteration."""
        trainer = self.checkpoint["trainer"]
        state = trainer.get("hooks", {}).get(RUN_STATE, {})
        return float(state.get("started", 0.0)), trainer["iteration"]


def latest_checkpoint(folder: str | os.PathLike, *, allow_pickle: bool = False) -> Found | None:
    """The newest checkpoint in ``folder`` that can be read whole and holds model, optimizer and iteration; None where there is none at all.

    Looked at are ``model_0000123.pth``, ``model_final.pth`` and what the tag ``last_checkpoint`` names. Where the tag names a good one,
    only those that may be newer are read: a run that was killed may not have come to write its tag. Of two runs in one folder the one that
    was started later counts. Those that cannot be used are named in a warning.

    Raises:
        CheckpointError: there are checkpoints, or a tag, but none that can be used.
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
        if found is not None and (best is None or found.age > best.age):
            best = found
    if best is None:
        if tag is None and not broken:
            return None
        reasons = "; ".join(broken.values()) or f"{folder / TAG} names {tag or 'nothing'}, and no checkpoint is there"
        raise CheckpointError(
            f"{folder} has no checkpoint to go on from ({reasons}): put one back, or begin anew without --resume"
        )
    name = os.path.basename(best.path)
    for reason in broken.values():
        logger.warning("A checkpoint cannot be used: %s Going on from %s, the newest that can.", reason, name)
    if tag is not None and name != tag and tag not in broken:
        logger.warning("%s names %r, but the newest checkpoint is %s: going on from it.", folder / TAG, tag, name)
    return best


def numbered(folder: str | os.PathLike) -> list[str]:
    """Names of the checkpoints ``model_0000123.pth`` in ``folder``, the newest first."""
    return [name for name, iteration in _names(Path(folder)) if iteration is not None]


def _names(folder: Path) -> Iterator[tuple[str, int | None]]:
    """Names of checkpoints and their iterations, the last ones first; None for the final one's, which its name does not tell."""
    found = [(match[0], match[1]) for path in folder.glob("model_*.pth") if (match := _NAME.fullmatch(path.name))]
    iterations = {name: None if number == "final" else int(number) for name, number in found}
    yield from sorted(iterations.items(), key=lambda item: float("inf") if item[1] is None else item[1], reverse=True)


def _read_tag(folder: Path) -> str | None:
    """What the tag says; None where there is no tag."""
    try:
        return (folder / TAG).read_text(encoding="utf-8", errors="replace").strip("\0 \r\n\t")
    except OSError:
        return None


def _read(path: Path, broken: dict[str, str], allow_pickle: bool) -> Found | None:
    try:
        checkpoint = read_checkpoint(path, allow_pickle=allow_pickle)
    except (CheckpointError, OSError) as error:
        broken[path.name] = str(error)
        return None
    trainer = checkpoint.get("trainer")
    whole = (
        isinstance(trainer, Mapping)
        and isinstance(trainer.get("iteration"), int)
        and "optimizer" in trainer.get("_trainer", {})
    )
    if not whole:
        broken[path.name] = f"{path} holds weights, but not the iteration and the optimizer of a run."
        return None
    return Found(str(path), checkpoint)
