#!/usr/bin/env python3
"""Curves of one run or several in one picture, one panel for each metric, from the metrics.json that training writes into OUTPUT_DIR.

    python tools/plot_metrics.py --runs pretrained=output/a "from scratch=output/b" --metric bbox/AP segm/AP --output ap.png

Without --metric these are all losses, the rate, and the AP of boxes and masks; where averaged weights (MODEL.EMA) were evaluated too, their
AP is drawn dashed. The ending of --output says the format: png, svg, pdf and others.
The last and the best value of each run are printed. For losses the best is the lowest, for anything else the highest.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from halodet.benchmark.chart import draw_curves, known_formats
from halodet.engine.metrics_file import MetricsError, read_metrics

from tabulate import tabulate

APS = ("bbox/AP", "segm/AP")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="NAME=OUTPUT_DIR", help="runs, and their names in the picture"
    )
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="as in metrics.json (losses, rate and AP)")
    parser.add_argument("--title", default="", help="of the picture (none)")
    parser.add_argument(
        "--output", type=Path, default=Path("metrics.png"), metavar="FILE", help="picture to write (metrics.png)"
    )
    args = parser.parse_args(argv)
    named = [run.partition("=") for run in args.runs]
    for run, (name, _, folder) in zip(args.runs, named, strict=True):
        if not name or not folder:
            parser.error(f"--runs got {run!r}, expected NAME=OUTPUT_DIR")
    if len({name for name, _, _ in named}) < len(named):
        parser.error(f"--runs has a name twice: {', '.join(name for name, _, _ in named)}")
    if args.output.suffix.lstrip(".").lower() not in known_formats():
        parser.error(f"--output {args.output} ends in no known format: these are {', '.join(known_formats())}")
    try:
        args.curves = {name: read_metrics(folder) for name, _, folder in named}
    except MetricsError as error:
        parser.error(str(error))
    args.dashed = {}
    if args.metric is None:
        args.metric, args.dashed = usual(args.curves), {ap: f"ema/{ap}" for ap in APS}
        if not args.metric:
            parser.error(
                f"the runs have no loss, rate or AP: name a --metric, one of {', '.join(sorted(set().union(*args.curves.values())))}"
            )
        return args
    args.metric = list(dict.fromkeys(args.metric))
    for name, metrics in args.curves.items():
        missing = [metric for metric in args.metric if metric not in metrics]
        if missing:
            parser.error(f"run {name} has no metric {', '.join(missing)}: it has {', '.join(sorted(metrics))}")
    return args


def usual(runs: dict[str, dict[str, dict[int, float]]]) -> list[str]:
    """Losses, rate and AP, as far as a run has them; those that tell most come first."""
    known = set().union(*runs.values())
    losses = sorted(name for name in known if "loss" in name and name != "total_loss")
    return [name for name in ("total_loss", "lr", *APS, *losses) if name in known]


def curves_of(
    runs: dict[str, dict[str, dict[int, float]]], metrics: dict[str, str]
) -> dict[str, dict[str, dict[int, float]]]:
    """Panel -> name of its metric, as panel -> run -> the metric's curve, of the runs that have it."""
    return {
        panel: {name: curves[metric] for name, curves in runs.items() if metric in curves}
        for panel, metric in metrics.items()
    }


def unit(metric: str) -> str:
    """What a metric of Detectron2's, or halodet's, is measured in; empty where it is a bare number."""
    name = metric.rpartition("/")[2]
    if name.startswith(("AP", "AR")):
        return "percent"
    units = {
        "lr": "learning rate",
        "images_per_second": "images per second",
        "memory_mib": "MiB",
        "data_share": "share of the iteration",
    }
    return "seconds" if name in ("time", "data_time", "eta_seconds", "rank_data_time") else units.get(name, "")


def summary(runs: dict[str, dict[str, dict[int, float]]], metrics: list[str]) -> str:
    """One row for each metric and run that has it: its last value and its best one, with their iterations."""
    rows = []
    for metric in metrics:
        choose = min if "loss" in metric else max
        for name, curves in runs.items():
            curve = curves.get(metric)
            if not curve:
                continue
            last = next(reversed(curve))
            finite = [iteration for iteration, value in curve.items() if math.isfinite(value)]
            best = choose(finite, key=curve.__getitem__, default=None)
            rows.append(
                [
                    metric,
                    name,
                    len(curve),
                    f"{curve[last]:.4g} at {last}",
                    "" if best is None else f"{curve[best]:.4g} at {best}",
                ]
            )
    return tabulate(
        rows,
        ["metric", "run", "points", "last, at iteration", "best, at iteration"],
        tablefmt="github",
        disable_numparse=True,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    panels = curves_of(args.curves, {metric: metric for metric in args.metric})
    dashed = curves_of(args.curves, args.dashed)
    try:
        draw_curves(
            panels, args.title, args.output, dashed, "averaged weights", {metric: unit(metric) for metric in panels}
        )
    except OSError as error:
        print(f"error: {args.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(summary(args.curves, [*args.metric, *args.dashed.values()]))
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
