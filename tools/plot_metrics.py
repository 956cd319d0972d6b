#!/usr/bin/env python3
"""Plot the metrics.json of one or several runs, one panel per metric, and print the last and the best values.

    python tools/plot_metrics.py --runs pretrained=output/a "from scratch=output/b" --metric bbox/AP segm/AP

The default metrics are all losses, the learning rate, and the AP of boxes and masks, with the AP of averaged weights
(MODEL.EMA) dashed. The best value is the lowest of a loss and the highest of any other metric. The suffix of --output
selects the format.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from halodet.benchmark.chart import draw_curves, known_formats
from halodet.benchmark.metrics import read_metrics
from halodet.errors import HalodetError

from tabulate import tabulate

AP = ("bbox/AP", "segm/AP")
Curves = Mapping[str, Mapping[int, float]]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=OUTPUT_DIR", help="runs with their labels")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="names in metrics.json (losses, lr and AP)")
    parser.add_argument("--title", default="", help="title of the figure (none)")
    parser.add_argument("--output", type=Path, default=Path("metrics.png"), metavar="FILE", help="image (metrics.png)")
    args = parser.parse_args(argv)
    named = [run.partition("=") for run in args.runs]
    for run, (name, _, folder) in zip(args.runs, named, strict=True):
        if not name or not folder:
            parser.error(f"--runs {run} is invalid: expected NAME=OUTPUT_DIR")
    names = ", ".join(name for name, _, _ in named)
    if len({name for name, _, _ in named}) < len(named):
        parser.error(f"--runs {names} is invalid: expected different names")
    if args.output.suffix.lstrip(".").lower() not in known_formats():
        parser.error(f"--output {args.output} is invalid: expected a suffix out of {', '.join(known_formats())}")
    try:
        args.curves = {name: read_metrics(folder) for name, _, folder in named}
    except HalodetError as error:
        parser.error(str(error))
    args.dashed = {}
    if args.metric is None:
        args.metric, args.dashed = default_metrics(args.curves), {ap: f"ema/{ap}" for ap in AP}
        if not args.metric:
            known = ", ".join(sorted(set().union(*args.curves.values())))
            parser.error(f"--metric is missing: the runs have no loss, lr or AP. Fix: name one of {known}")
        return args
    args.metric = list(dict.fromkeys(args.metric))
    for name, metrics in args.curves.items():
        missing = ", ".join(metric for metric in args.metric if metric not in metrics)
        if missing:
            parser.error(f"--metric {missing} is invalid for run {name}: expected one of {', '.join(sorted(metrics))}")
    return args


def default_metrics(runs: Mapping[str, Curves]) -> list[str]:
    """Return the losses, learning rate and AP that a run has, the most important ones first."""
    known = set().union(*runs.values())
    losses = sorted(name for name in known if "loss" in name and name != "total_loss")
    return [name for name in ("total_loss", "lr", *AP, *losses) if name in known]


def select(runs: Mapping[str, Curves], metrics: Mapping[str, str]) -> dict[str, Curves]:
    """Return panel -> run -> curve for ``metrics``, which maps panels to the names of their metrics."""
    return {
        panel: {name: curves[metric] for name, curves in runs.items() if metric in curves}
        for panel, metric in metrics.items()
    }


def unit(metric: str) -> str:
    """Return the unit of a metric; empty for a bare number."""
    name = metric.rpartition("/")[2]
    if name.startswith(("AP", "AR")):
        return "percent"
    units = {"lr": "learning rate", "images_per_second": "images per second", "memory_mib": "MiB"}
    units |= {"data_share": "fraction of the iteration"}
    return "seconds" if name in ("time", "data_time", "eta_seconds", "rank_data_time") else units.get(name, "")


def summary(runs: Mapping[str, Curves], metrics: Sequence[str]) -> str:
    """Return a table with the last and the best value of each metric and run, and their iterations."""
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
            values = ("" if at is None else f"{curve[at]:.4g} at {at}" for at in (last, best))
            rows.append([metric, name, len(curve), *values])
    headers = ["metric", "run", "points", "last, at iteration", "best, at iteration"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    panels = select(args.curves, {metric: metric for metric in args.metric})
    dashed = select(args.curves, args.dashed)
    units = {metric: unit(metric) for metric in panels}
    try:
        draw_curves(panels, args.title, args.output, dashed, "averaged weights", units)
    except OSError as error:
        print(f"error: --output {args.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(summary(args.curves, [*args.metric, *args.dashed.values()]))
    print(f"Saved {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
