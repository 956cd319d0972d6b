"""Run the items of one step in this process and write the report before every item.

    python -m halodet.benchmark.gpu_check.child STEP --output FOLDER --seconds SECONDS [--dry-run]

A step's module has a function ``items(context)``: pairs of a name and a call that returns the figures of the item.
``"failed"`` among the figures, or an exception, is a failure; :class:`.context.Skipped` a reason not to run it.

A process that starts where another one ended continues after the item that ended it. Exit codes: 0 all items passed,
1 an item failed, 3 the GPU is unusable after an error: start again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from halodet.benchmark.gpu_check.context import Context, Skipped
from halodet.benchmark.gpu_check.steps import STEPS, find_step
from halodet.utils.io import write_json

RESTART = 3
Items = Iterable[tuple[str, Callable[[], dict[str, Any]]]]


def report_path(output: Path, step: str) -> Path:
    """Return the file that a step writes."""
    return output / f"{step}.json"


def read_report(output: Path, step: str) -> dict[str, Any]:
    """Return the report that a step has written so far."""
    try:
        return json.loads(report_path(output, step).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"finished": False, "running": None, "stand_ins": [], "items": {}}


def describe_error(error: BaseException) -> str:
    """Return type and message of an error, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def run_item(call: Callable[[], dict[str, Any]], context: Context) -> tuple[dict[str, Any], bool]:
    """Run an item; return its record and whether the device is usable."""
    start, usable = time.monotonic(), True
    try:
        figures = call()
        context.synchronize()
        record = {"status": "failed" if "failed" in figures else "passed", **figures}
    except Skipped as reason:
        record = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # the next item runs in any case
        traceback.print_exc()
        record = {"status": "failed", "failed": describe_error(error)}
        try:
            context.synchronize()
        except Exception as sticky:
            usable, record["device"] = False, describe_error(sticky)
    return {"seconds": round(time.monotonic() - start, 2), **record}, usable


def run_items(step: str, items: Items, context: Context) -> int:
    """Run the items that the report does not have yet; return the exit code."""
    report = read_report(context.output, step)
    records: dict[str, dict[str, Any]] = report["items"]
    if report["running"]:
        records[report["running"]] = {"status": "failed", "failed": "the process ended while this item ran"}
    context.stand_ins += [text for text in report["stand_ins"] if text not in context.stand_ins]

    def write(running: str | None, finished: bool = False) -> None:
        content = {"finished": finished, "running": running, "stand_ins": context.stand_ins, "items": records}
        write_json(report_path(context.output, step), content)

    for name, call in items:
        if name in records:
            continue
        if context.time_left() <= 0:
            records[name] = {"status": "not run"}
            continue
        write(name)
        records[name], usable = run_item(call, context)
        print(f"{records[name]['status']}: {name} {records[name].get('failed', '')}", flush=True)
        if not usable:
            write(None)
            return RESTART
    write(None, finished=True)
    return int(any(record["status"] == "failed" for record in records.values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[step.name for step in STEPS])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    context = Context(args.dry_run, args.output, time.monotonic() + args.seconds)
    module = importlib.import_module(f"{__package__}.{find_step(args.step).module}")
    return run_items(args.step, module.items(context), context)


if __name__ == "__main__":
    sys.exit(main())
