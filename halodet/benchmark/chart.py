"""Pictures of measurements: how many times as long contenders take as one of them, and curves over a training run."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

_MARKED = 50  # points of a curve up to which each is marked
_CROWDED = 200  # points of a curve beyond which they cannot be told apart


def draw_ratios(
    panels: dict[str, tuple[list[str], dict[str, list[float | None]]]],
    title: str,
    path: Path,
    xlabel: str = "time / time of halodet (above 1: halodet is faster)",
) -> None:
    """Draw one panel of horizontal bars per entry, all with the same rows, and write them to ``path`` (PNG, SVG, PDF).

    Args:
        panels: title of a panel -> (label of each row, name in the legend -> its ratio in each row, None where there is none).
        title: of the whole.
        path: the file; its ending says the format.
        xlabel: what the ratios are.
    """
    rows = max(len(labels) for labels, _ in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 1.4 + 0.34 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, (labels, ratios)) in zip(axes[0], panels.items(), strict=True):
        height = 0.8 / max(1, len(ratios))
        for i, (contender, values) in enumerate(ratios.items()):
            at = [row + (i - (len(ratios) - 1) / 2) * height for row in range(len(values))]
            axis.barh(at, [value or 0 for value in values], height, label=contender)
            for y, value in zip(at, values, strict=True):
                if value:
                    axis.text(value, y, f" {value:.2f}", va="center", fontsize=6)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=name, xlabel=xlabel, yticks=range(len(labels)), yticklabels=labels)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(x=0.12, y=0.01)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(loc="best", fontsize=8)
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
    """Draw curves over iterations, one panel per metric and three in a row, each run in one colour, and write them to ``path``.

    All panels have the same axis of iterations. A curve of more points than can be told apart is drawn pale, with its running median on it.

    Args:
        panels: name of a metric -> name of a run -> iteration -> value; values that are no finite numbers are left out. A run may be
            missing in some panels.
        title: of the whole; may be empty.
        path: the file; its ending says the format, one of :func:`known_formats`.
        dashed: as ``panels``: further curves of some of them, drawn dashed in the colour of their run.
        dashed_label: what these are.
        units: name of a metric -> what stands at its axis.
    """
    dashed = dashed or {}
    colours = {
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
                crowded = len(points) > _CROWDED
                if crowded:
                    axis.plot(*points.T, color=colours[run], linewidth=0.5, alpha=0.25, zorder=1)
                    points[:, 1] = _running_median(points[:, 1])
                few = len(points) <= _MARKED
                axis.plot(*points.T, color=colours[run], linestyle=style, marker="o" if few else "", markersize=3)
        axis.set(title=metric, xlabel="iteration", ylabel=(units or {}).get(metric, ""))
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    # One legend for all panels, since a run may be missing in the first.
    handles = [Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
    if any(dashed.values()):
        handles.append(Line2D([], [], color="grey", linestyle="--", label=dashed_label))
    axes[0][0].legend(handles=handles, loc="best", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _running_median(values: np.ndarray) -> np.ndarray:
    """The median of the values around each one; steps stay steps."""
    half = len(values) // _CROWDED
    padded = np.pad(values, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def known_formats() -> list[str]:
    """Endings of the files that pictures can be written to."""
    return sorted(FigureCanvasAgg.get_supported_filetypes())
