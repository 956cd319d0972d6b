"""Train detectors with several seeds and compare them: what tools/compare.py does."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

from halodet.benchmark.comparison.arguments import parse
from halodet.benchmark.comparison.model_figures import count_models
from halodet.benchmark.comparison.plan import Run, make_plan
from halodet.benchmark.comparison.record import check_record
from halodet.benchmark.comparison.report import (
    CHART,
    RUNS,
    SUMMARY,
    TABLE,
    draw,
    format_table,
    write_runs,
    write_summary,
)
from halodet.benchmark.comparison.results import Result, read_result
from halodet.benchmark.comparison.summary import group, summarize
from halodet.benchmark.comparison.training import lock_folder, train
from halodet.engine.preemption import PREEMPTED
from halodet.errors import CheckpointWriteError, HalodetError

INTERRUPTED = 130  # exit code of a shell for Ctrl-C


def main(argv: list[str] | None, description: str, train_net: Path) -> int:
    """Run the tool; return its exit code.

    Args:
        argv: arguments; None for those of this process.
        description: description for ``--help``.
        train_net: path of tools/train_net.py.
    """
    args = parse(argv, description)
    lock = None
    try:
        lock = lock_folder(args.output)
        runs = make_plan(args)
        for run in runs:
            check_record(run)
        results = train_all(runs, args, train_net, lock)
        report(results, args)
    except HalodetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or 'standard output'} cannot be written: {error.strerror}", file=sys.stderr)
        return CheckpointWriteError.exit_code
    except (KeyboardInterrupt, SystemExit) as stop:
        print("Interrupted. Run the same command again to continue: finished runs are not repeated.", flush=True)
        return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else PREEMPTED
    finally:
        if lock is not None:
            os.close(lock)
    return int(any(result.reason for result in results))


def train_all(runs: list[Run], args: argparse.Namespace, train_net: Path, lock: int | None) -> list[Result]:
    """Train the runs that have not finished; print a line and write runs.csv after each of them."""
    results = [read_result(run) for run in runs]
    waiting = [index for index, result in enumerate(results) if result is None]
    print(f"{args.output}: {len(runs)} run(s), {len(runs) - len(waiting)} finished before", flush=True)
    seconds: list[float] = []
    for index in waiting:
        start = time.monotonic()
        results[index] = result = train(runs[index], train_net, args.train_flags, lock)
        if not result.reason:
            seconds.append(time.monotonic() - start)
        known = [result for result in results if result is not None]
        left = len(waiting) - waiting.index(index) - 1
        print(progress_line(result, f"{len(known)}/{len(runs)}", seconds, left), flush=True)
        write_runs(args.output, known, args.vary and args.vary[0])
    return [result for result in results if result is not None]


def progress_line(result: Result, position: str, seconds: list[float], left: int) -> str:
    """Return the line about a run that has ended.

    Args:
        result: its result.
        position: number of this run, and of all.
        seconds: durations of the runs that this process has finished.
        left: number of runs to train.
    """
    if result.reason:
        text = f"failed: {result.reason} (log: {result.log})"
    else:
        text = f"box AP {result.box_ap:.2f}" + ("" if result.mask_ap is None else f", mask AP {result.mask_ap:.2f}")
        text += f" in {format_duration(seconds[-1])}"
    if left and seconds:
        text += f"; {format_duration(left * statistics.fmean(seconds))} left"
    return f"{position} {result.run}: {text}"


def format_duration(seconds: float) -> str:
    """Return for example ``2:03:04`` (hours, minutes, seconds)."""
    return str(timedelta(seconds=round(seconds)))


def report(results: list[Result], args: argparse.Namespace) -> None:
    """Count multiply-adds, and print and write the tables and the chart."""
    configs = [
        next((path for result in found if (path := result.run.folder / "config.yaml").is_file()), None)
        for found in group(results).values()
    ]
    key, folder = args.vary and args.vary[0], args.output
    rows = summarize(results, count_models(configs, args.imports, args.size and tuple(args.size)))
    table = format_table(rows, results, key)
    print(f"\n{table}\n")
    write_runs(folder, results, key)
    write_summary(folder, rows, key)
    (folder / TABLE).write_text(f"{table}\n", encoding="utf-8")
    names = [RUNS, SUMMARY, TABLE]
    if any(row.box_ap for row in rows):
        draw(folder, rows, key)
        names.append(CHART)
    print(f"Wrote {folder}: {', '.join(names)}")
