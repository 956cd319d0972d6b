"""Read what Detectron2 wrote about a run into metrics.json."""

from __future__ import annotations

import json
from pathlib import Path

from halodet.errors import HalodetError

METRICS_FILE = "metrics.json"


class MetricsError(HalodetError, ValueError):
    """A metrics.json that cannot be used; the message is one sentence."""


def read_metrics(folder: str | Path) -> dict[str, dict[int, float]]:
    """The scalars of the run whose OUTPUT_DIR is ``folder``: name -> iteration -> value, iterations rising.

    A run that was stopped leaves a line cut short, which a resumed run writes on: what is cut is left out. Where an iteration comes
    again, the run went back to an earlier checkpoint, or began anew: what was written of that iteration and later ones is replaced.

    Raises:
        MetricsError: there is no metrics.json, or nothing in it can be read.
    """
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise MetricsError(
            f"{path} cannot be read ({error.strerror}): give the OUTPUT_DIR of a run that trained"
        ) from error
    metrics: dict[str, dict[int, float]] = {}
    for line in lines:
        try:
            # The lines are flat: whatever stands before the last brace is a line cut short.
            entry = json.loads(line[max(0, line.rfind("{")) :])
            iteration = entry.pop("iteration")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        if not isinstance(iteration, int):
            continue
        for name, value in entry.items():
            if not isinstance(value, int | float):
                continue
            points = metrics.setdefault(name, {})
            while points and next(reversed(points)) >= iteration:
                points.popitem()
            points[iteration] = float(value)
    if not metrics:
        raise MetricsError(f"{path} has {len(lines)} lines, and none of them is one of Detectron2's metrics")
    return metrics
