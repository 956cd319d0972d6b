"""Charts: bars of time ratios or of means with their deviation, and curves of training metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

_MAX_MARKED = 50  # curves of at most this many points get markers
_MAX_DISTINCT = 200  # longer curves are drawn pale, with their running median


def draw_ratios(
    panels: dict[str, tuple[list[str], dict[str, list[float | None]]]],
    title: str,
    path: Path,
    xlabel: str,
) -> None:
    """Draw panels of horizontal bars with shared rows.

    Args:
        panels: panel title -> (row labels, legend name -> ratio per row; None for a missing one).
        title: figure title.
        path: output file; its suffix selects the format.
        xlabel: label of the ratio axis.
    """
    rows = max(len(labels) for labels, _ in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 1.4 + 0.34 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (panel, (labels, ratios)) in zip(axes[0], panels.items(), strict=True):
        height = 0.8 / max(1, len(ratios))
        for i, (name, values) in enumerate(ratios.items()):
            at = [row + (i - (len(ratios) - 1) / 2) * height for row in range(len(values))]
            axis.barh(at, [value or 0 for value in values], height, label=name)
            for y, value in zip(at, values, strict=True):
                if value:
                    axis.text(value, y, f" {value:.2f}", va="center", fontsize=6)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=panel, xlabel=xlabel, yticks=range(len(labels)), yticklabels=labels)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(x=0.12, y=0.01)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(loc="best", fontsize=8)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@dataclass(frozen=True)
class Bar:
    """Bar of :func:`draw_bars`.

    Attributes:
        group: bars of a group are adjacent and have one color.
        label: text beside the bar.
        value: length of the bar; None for a missing one.
        deviation: half of the length of the error bar; None for none.
        highlighted: whether the bar has the full color; others are pale.
    """

    group: str
    label: str
    value: float | None
    deviation: float | None
    highlighted: bool = True


def draw_bars(panels: dict[str, list[Bar]], title: str, path: Path, xlabel: str) -> None:
    """Draw panels of horizontal bars with error bars; the panels have the same rows.

    Args:
        panels: panel title -> bars, those of a group in succession.
        title: figure title.
        path: output file; its suffix selects the format.
        xlabel: label of the x axis.
    """
    first = next(iter(panels.values()))
    groups = list(dict.fromkeys(bar.group for bar in first))
    several = len(first) > len(groups)
    at = [row + 0.6 * groups.index(bar.group) * several for row, bar in enumerate(first)]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(6.5 * len(panels), 1.4 + 0.34 * at[-1]),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (panel, bars) in zip(axes[0], panels.items(), strict=True):
        for y, bar in zip(at, bars, strict=True):
            if bar.value is None or not math.isfinite(bar.value):
                axis.text(0, y, " no value", va="center", fontsize=7)
                continue
            color, alpha = f"C{groups.index(bar.group) % 10}", 1.0 if bar.highlighted else 0.35
            axis.barh(y, bar.value, 0.8, xerr=bar.deviation, color=color, alpha=alpha, capsize=3)
            end = bar.value + (bar.deviation or 0.0)
            weight = "bold" if several and bar.highlighted else "normal"
            axis.text(end, y, f"  {bar.value:.2f}", va="center", fontsize=7, fontweight=weight)
        axis.set(title=panel, xlabel=xlabel, yticks=at, yticklabels=[bar.label for bar in bars])
        axis.tick_params(axis="y", labelsize=7)
        ends = [bar.value + (bar.deviation or 0.0) for bar in bars if bar.value is not None]
        longest = max(filter(math.isfinite, ends), default=0.0)
        axis.set(xlim=(0, 1.15 * longest or 1.0), ylim=(at[-1] + 0.6, -0.6))  # missing bars have no limits
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(
    panels: dict[str, dict[str, dict[int, float]]],
    title: str,
    path: Path,
    dashed: dict[str, dict[str, dict[int, float]]] | None = None,
    dashed_label: str = "",
    units: dict[str, str] | None = None,
) -> None:
    """Draw curves over iterations, one panel per metric (three per row, one shared x axis) and one color per run.

    Args:
        panels: metric -> run -> iteration -> value; non-finite values are skipped, a run may be missing in a panel.
        title: figure title; may be empty.
        path: output file; its suffix, one of :func:`known_formats`, selects the format.
        dashed: further curves, as ``panels``, drawn dashed in the color of their run.
        dashed_label: legend entry of the dashed curves.
        units: metric -> label of its y axis.
    """
    dashed = dashed or {}
    colors = {
        run: f"C{i % 10}"
        for i, run in enumerate(dict.fromkeys(run for runs in (*panels.values(), *dashed.values()) for run in runs))
    }
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for unused in axes.flat[len(panels) :]:
        unused.remove()
    for axis, (metric, runs) in zip(axes.flat, panels.items(), strict=False):
        for style, curves in (("-", runs), ("--", dashed.get(metric, {}))):
            for run, curve in curves.items():
                points = np.array([point for point in curve.items() if math.isfinite(point[1])]).reshape(-1, 2)
                dense = len(points) > _MAX_DISTINCT
                if dense:
                    axis.plot(*points.T, color=colors[run], linewidth=0.5, alpha=0.25, zorder=1)
                    points[:, 1] = _running_median(points[:, 1])
                few = len(points) <= _MAX_MARKED
                axis.plot(*points.T, color=colors[run], linestyle=style, marker="o" if few else "", markersize=3)
        axis.set(title=metric, xlabel="iteration", ylabel=(units or {}).get(metric, ""))
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    # One legend for all panels: a run may be missing in the first.
    handles = [Line2D([], [], color=color, label=run) for run, color in colors.items()]
    if any(dashed.values()):
        handles.append(Line2D([], [], color="grey", linestyle="--", label=dashed_label))
    axes[0][0].legend(handles=handles, loc="best", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _running_median(values: np.ndarray) -> np.ndarray:
    """Return the running median, which preserves steps."""
    half = len(values) // _MAX_DISTINCT
    padded = np.pad(values, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def known_formats() -> list[str]:
    """Return the suffixes of the supported output formats."""
    return sorted(FigureCanvasAgg.get_supported_filetypes())
