"""Read the metrics.json of a run."""

from __future__ import annotations

import json
from pathlib import Path

from halodet.errors import HalodetError


def read_metrics(folder: str | Path) -> dict[str, dict[int, float]]:
    """Read the metrics.json that Detectron2 writes, as name -> iteration -> value in rising order of iterations.

    A killed run leaves an incomplete line, to which the resumed run appends; the incomplete part is ignored. If an
    iteration occurs again, the run was resumed from an earlier checkpoint: later values of the first run are dropped.

    Raises:
        HalodetError: the file cannot be read or has no metrics.
    """
    path = Path(folder) / "metrics.json"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise HalodetError(f"{path} cannot be read ({error.strerror}). Fix: give the OUTPUT_DIR of a run") from error
    metrics: dict[str, dict[int, float]] = {}
    for line in lines:
        try:
            entry = json.loads(line[max(0, line.rfind("{")) :])  # entries are flat: the last brace begins the last one
            iteration = entry.pop("iteration")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        if not isinstance(iteration, int):
            continue
        for name, value in entry.items():
            if isinstance(value, int | float):
                points = metrics.setdefault(name, {})
                while points and next(reversed(points)) >= iteration:
                    points.popitem()
                points[iteration] = float(value)
    if not metrics:
        raise HalodetError(f"{path} has no metrics in its {len(lines)} lines: expected the metrics.json of a run")
    return metrics
