"""Result of a run, from its metrics.json."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from halodet.benchmark.comparison.plan import Run
from halodet.benchmark.metrics import read_metrics
from halodet.errors import HalodetError

BOX_AP, MASK_AP = "bbox/AP", "segm/AP"


@dataclass(frozen=True)
class Result:
    """Figures of a finished run, or the reason why there are none.

    Attributes:
        run: the run.
        box_ap: AP of boxes after the last iteration, in percent; None if the run failed.
        mask_ap: AP of masks; None without masks.
        seconds_per_iter: median time of an iteration; None in a run of three, which Detectron2 does not time.
        memory_mib: peak memory of training in the main process: of its GPU, or of the host without one.
        reason: why the run failed; empty if it did not.
        log: file with the output of a failed run.
    """

    run: Run
    box_ap: float | None = None
    mask_ap: float | None = None
    seconds_per_iter: float | None = None
    memory_mib: float | None = None
    reason: str = ""
    log: Path | None = None


def read_result(run: Run) -> Result | None:
    """Return the result of a run, None if it has not been evaluated after its last iteration."""
    try:
        metrics = read_metrics(run.folder)
    except HalodetError:
        return None
    box_ap = metrics.get(BOX_AP, {}).get(run.max_iter)
    if box_ap is None:
        return None
    times, memory = (list(metrics.get(name, {}).values()) for name in ("time", "memory_mib"))
    return Result(
        run,
        box_ap,
        metrics.get(MASK_AP, {}).get(run.max_iter),
        statistics.median(times) if times else None,
        max(memory, default=None),
    )
