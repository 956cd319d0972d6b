"""Tables, CSV files and chart of a comparison."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halodet.benchmark.chart import Bar, draw_bars
from halodet.benchmark.comparison.model_figures import ModelFigures
from halodet.benchmark.comparison.results import Result
from halodet.benchmark.comparison.summary import Row, Spread
from halodet.utils.io import atomic_write

from tabulate import tabulate

RUNS, SUMMARY, TABLE, CHART = "runs.csv", "summary.csv", "table.md", "comparison.png"


def write_runs(folder: Path, results: Sequence[Result], key: str | None) -> None:
    """Write runs.csv, one line per run, with all digits; ``key`` is that of ``--vary``."""
    rows = [
        {
            "name": result.run.name,
            **({key: result.run.value} if key else {}),
            "seed": result.run.seed,
            "status": "failed" if result.reason else "finished",
            "box_ap": result.box_ap,
            "mask_ap": result.mask_ap,
            "seconds_per_iter": result.seconds_per_iter,
            "memory_mib": result.memory_mib,
            "folder": result.run.folder,
            "reason": result.reason,
            "log": result.log,
        }
        for result in results
    ]
    _write_csv(folder / RUNS, rows)


def write_summary(folder: Path, rows: Sequence[Row], key: str | None) -> None:
    """Write summary.csv, one line per row, with all digits; ``key`` is that of ``--vary``."""
    _write_csv(folder / SUMMARY, [_summary_line(row, key) for row in rows])


def _summary_line(row: Row, key: str | None) -> dict[str, Any]:
    figures = row.figures
    line: dict[str, Any] = {"name": row.name}
    if key:
        line |= {key: row.value, "best": int(row.best)}
    line |= {"finished": row.finished, "runs": row.runs}
    for name, ap in (("box_ap", row.box_ap), ("mask_ap", row.mask_ap)):
        line |= {f"{name}_mean": ap and ap.mean, f"{name}_sd": ap and ap.sd}
    names = ("parameters", "backbone_parameters", "multiply_adds", "backbone_multiply_adds", "height", "width")
    line |= {name: figures and getattr(figures, name) for name in names}
    return line | {"seconds_per_iter": row.seconds_per_iter, "memory_mib": row.memory_mib}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is an empty field
    atomic_write(path, lambda file: Path(file).write_text(text.getvalue(), encoding="utf-8"))


def format_table(rows: Sequence[Row], results: Sequence[Result], key: str | None) -> str:
    """Return the table of all rows, and below it that of the failed runs."""
    headers = ["name", *([key] if key else []), "runs", "box AP", "mask AP", "parameters (M)", "of backbone",
               "multiply-adds (G)", "of backbone", "s/iteration", "memory (MiB)"]  # fmt: skip
    lines = [
        [
            row.name,
            *([f"{row.value} (best)" if row.best else row.value] if key else []),
            str(row.finished) if row.finished == row.runs else f"{row.finished} of {row.runs}",
            _ap(row.box_ap, missing="-" if row.finished else "failed"),
            _ap(row.mask_ap),
            *_model_cells(row.figures),
            "-" if row.seconds_per_iter is None else f"{row.seconds_per_iter:.3g}",
            "-" if row.memory_mib is None else f"{row.memory_mib:.0f}",
        ]
        for row in rows
    ]
    notes = ["AP: mean ± sample standard deviation over the seeds. Time: median. Memory: maximum of training."]
    sizes = {(row.figures.height, row.figures.width) for row in rows if row.figures}
    if sizes:
        notes.append(f"Multiply-adds: one image of {', '.join(f'{h}×{w}' for h, w in sorted(sizes))}.")
    texts = [tabulate(lines, headers, tablefmt="github", disable_numparse=True), " ".join(notes)]
    failed = [[str(result.run), result.reason, str(result.log)] for result in results if result.reason]
    if failed:
        texts.append(tabulate(failed, ["failed run", "reason", "log"], tablefmt="github", disable_numparse=True))
    return "\n\n".join(texts)


def _ap(ap: Spread | None, missing: str = "-") -> str:
    return missing if ap is None else str(ap)


def _model_cells(figures: ModelFigures | None) -> list[str]:
    if figures is None:
        return ["-"] * 4
    millions = (figures.parameters / 1e6, figures.backbone_parameters / 1e6)
    billions = (figures.multiply_adds / 1e9, figures.backbone_multiply_adds / 1e9)
    return [f"{number:.4g}" for number in (*millions, *billions)]


def draw(folder: Path, rows: Sequence[Row], key: str | None) -> None:
    """Draw comparison.png: box and mask AP of each row with error bars of one standard deviation; a row must have one.

    With ``--vary``, the best value of a name has the full color.
    """
    panels: dict[str, list[Bar]] = {}
    for title, aps in (("box AP", [row.box_ap for row in rows]), ("mask AP", [row.mask_ap for row in rows])):
        if any(aps):
            panels[title] = [
                Bar(
                    row.name,
                    row.name if row.value is None else f"{row.name}, {row.value}",
                    ap.mean if ap else None,
                    ap.sd if ap else None,
                    highlighted=row.best or row.value is None,
                )
                for row, ap in zip(rows, aps, strict=True)
            ]
    title = "mean and standard deviation over the seeds" + (f"; full color: the best {key}" if key else "")
    draw_bars(panels, title, folder / CHART, "percent")
