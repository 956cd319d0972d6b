"""Run steps as processes with a time limit; a failed step is recorded and the others run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from halodet.benchmark.gpu_check.child import RESTART, read_report, report_path
from halodet.benchmark.gpu_check.steps import Step

ROOT = Path(__file__).resolve().parents[3]
MAX_STARTS = 6  # of the process of a step
_MARGIN = 3.0  # seconds in which a process can write its report before it is killed


def make_environment(output: Path, dry_run: bool) -> dict[str, str]:
    """Return the environment of all processes: one cache of compiled kernels, no network."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(output / "triton_cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(output / "inductor_cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    environment.pop("TRITON_INTERPRET", None)
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def run_command(command: list[str], log: Path, timeout: float, environment: dict[str, str]) -> int | None:
    """Run a command with its output appended to ``log``; return its exit code, or None if it timed out."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also after Ctrl-C
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes it started
                process.wait()


def run_step(step: Step, output: Path, dry_run: bool, limit: float) -> dict[str, Any]:
    """Run a step, again after a crash, and return its record."""
    log = output / f"{step.name}.log"
    for old in (log, report_path(output, step.name)):
        old.unlink(missing_ok=True)
    start, done = time.monotonic(), -1
    codes: list[int | None] = []
    while len(codes) < MAX_STARTS:
        left = limit - (time.monotonic() - start)
        command = [sys.executable, "-m", f"{__package__}.child", step.name, "--output", str(output)]
        command += ["--seconds", f"{max(left / 2, left - _MARGIN):.1f}", *(["--dry-run"] if dry_run else [])]
        codes.append(run_command(command, log, max(left, 0.1), make_environment(output, dry_run)))
        report = read_report(output, step.name)
        progress, done = len(report["items"]) + bool(report["running"]) - done, len(report["items"])
        # Negative: a signal. 134 and 139: a shell's codes for abort and segmentation fault.
        crashed = codes[-1] is not None and (codes[-1] < 0 or codes[-1] in (RESTART, 134, 139))
        if report["finished"] or not crashed or progress <= 0:
            break
    return make_record(step, report, codes, log, time.monotonic() - start, limit)


def make_record(
    step: Step, report: dict[str, Any], codes: list[int | None], log: Path, seconds: float, limit: float
) -> dict[str, Any]:
    """Return the record of a step: its status, items, worst number and last lines of output."""
    items = report["items"]
    if report["running"]:
        ended = f"timed out after {limit:.0f} s" if codes[-1] is None else f"the process ended with code {codes[-1]}"
        items[report["running"]] = {"status": "failed", "failed": ended}
    counts = Counter(item["status"] for item in items.values())
    if counts["failed"]:
        status = "failed"
    elif codes[-1] is None or counts["not run"]:
        status = "timed out"
    elif not report["finished"]:
        status = "failed"
    else:
        status = "passed" if counts["passed"] else "skipped"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return {
        "name": step.name,
        "status": status,
        "seconds": round(seconds, 1),
        "budget": step.budget,
        "limit": round(limit, 1),
        "exit_codes": codes,
        "counts": dict(counts),
        "worst": max((item["worst"] for item in items.values() if item.get("worst") is not None), default=None),
        "measure": step.measure,
        "stand_ins": report["stand_ins"],
        "items": items,
        "last_lines": lines[-15:],
    }
