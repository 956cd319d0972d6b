"""The tests of the Triton backend on the GPU, with one tiling per kernel."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context
from halodet.benchmark.gpu_check.runner import run_command

MAX_WORKERS = 8


def items(context: Context) -> Items:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", "tests/attention", "-p", "no:cacheprovider"]
    command += ["-p", "halodet.benchmark.gpu_check.single_tiling"]
    if context.dry_run:
        context.replace("all tests: those of arguments that the kernels do not support")
        command += ["-k", "unsupported"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(len(os.sched_getaffinity(0)), MAX_WORKERS)))]
    yield "tests/attention", partial(run_pytest, command, context)


def run_pytest(command: list[str], context: Context) -> dict[str, Any]:
    """Return the numbers of passed and failed tests."""
    log = context.output / "pytest.log"
    log.unlink(missing_ok=True)
    code = run_command(command, log, max(1.0, context.time_left()), dict(os.environ))
    figures: dict[str, Any] = read_pytest_log(log)
    if code != 0:
        figures["failed"] = "timed out" if code is None else f"pytest ended with code {code}, see {log.name}"
    return figures


def read_pytest_log(log: Path) -> dict[str, Any]:
    """Return the counts of pytest's last line and the names of failed tests."""
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text)
    counts = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", text.strip().rpartition("\n")[2])
    }
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    return {"worst": len(failures), "counts": counts, "errors": failures[:10]}
