"""Means and standard deviations over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from halodet.benchmark.comparison.model_figures import ModelFigures
from halodet.benchmark.comparison.results import Result


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (divisor n - 1); the latter is None for one number."""

    mean: float
    sd: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.sd is None else f" ± {self.sd:.2f}")


@dataclass(frozen=True)
class Row:
    """Summary of the runs of one name and value, which differ in their seed.

    Attributes:
        name: name of the config and variant.
        value: value of the key of ``--vary``; None without it.
        finished: number of finished runs; only these count.
        runs: number of runs.
        box_ap: AP of boxes; None if no run has finished.
        mask_ap: AP of masks.
        seconds_per_iter: median of the runs.
        memory_mib: maximum of the runs.
        figures: parameters and multiply-adds.
        best: whether this is the value with the highest mean box AP of its name.
    """

    name: str
    value: str | None
    finished: int
    runs: int
    box_ap: Spread | None
    mask_ap: Spread | None
    seconds_per_iter: float | None
    memory_mib: float | None
    figures: ModelFigures | None = None
    best: bool = False


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def group(results: Iterable[Result]) -> dict[tuple[str, str | None], list[Result]]:
    """Return the results of each name and value, in their order."""
    groups: dict[tuple[str, str | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.run.name, result.run.value), []).append(result)
    return groups


def summarize(results: Iterable[Result], figures: Sequence[ModelFigures | None]) -> list[Row]:
    """Return a row for each name and value.

    Args:
        results: results of all runs.
        figures: figures of each group of :func:`group`.
    """
    groups = group(results)
    spreads = {key: spread(result.box_ap for result in found) for key, found in groups.items()}
    # A value with which seeds failed is the best only if it has failures everywhere: the others may be its lucky ones.
    best: dict[str, tuple[str, str | None]] = {}
    ranks: dict[tuple[str, str | None], tuple[bool, float]] = {}
    for key, ap in spreads.items():
        if ap and not math.isnan(ap.mean):
            ranks[key] = (not any(result.reason for result in groups[key]), ap.mean)
            if key[0] not in best or ranks[key] > ranks[best[key[0]]]:
                best[key[0]] = key
    rows = []
    for (key, found), model in zip(groups.items(), figures, strict=True):
        finished = [result for result in found if not result.reason]
        times = [result.seconds_per_iter for result in finished if result.seconds_per_iter is not None]
        memory = [result.memory_mib for result in finished if result.memory_mib is not None]
        rows.append(
            Row(
                *key,
                len(finished),
                len(found),
                spreads[key],
                spread(result.mask_ap for result in finished),
                statistics.median(times) if times else None,
                max(memory, default=None),
                model,
                key[1] is not None and best.get(key[0]) == key,
            )
        )
    return rows
