"""Check the Triton kernels of halodet on an NVIDIA GPU, most valuable steps first, in at most 8 minutes.

    python tools/gpu_check.py                        # or: make gpu-check
    python tools/gpu_check.py --step correctness     # one step
    python tools/gpu_check.py --dry-run              # all steps on the CPU at tiny sizes, without a GPU

Writes gpu_check.json after every step, gpu_check.md (a table) at the end, and a log per step to --output. A step runs
in a process of its own with a time limit; a failed step is recorded and the others run. Needs no network.

Without a GPU, TRITON_INTERPRET=1 implies --dry-run.

Exit codes: 0 all steps passed or were skipped, 1 a step failed or timed out, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from halodet.benchmark.gpu_check.runner import run_step
from halodet.benchmark.gpu_check.steps import STEPS, TIME_LIMIT, Step
from halodet.benchmark.gpu_check.summary import format_plan, format_summary
from halodet.benchmark.report import output_folder
from halodet.utils.io import write_json

import torch


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--output", type=output_folder, default="output/gpu_check", metavar="FOLDER")
    parser.add_argument("--step", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU in Triton's interpreter, at tiny sizes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not args.dry_run and not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":
            print(f"error: no NVIDIA GPU is available to PyTorch {torch.__version__}", file=sys.stderr)
            return 2
        args.dry_run = True
    output = args.output.resolve()
    steps = [step for step in STEPS if step.name in args.step]
    print(format_plan(steps, args.dry_run), flush=True)
    result: dict[str, Any] = {"dry_run": args.dry_run, "plan": [step._asdict() for step in steps], "steps": []}
    start, planned = time.monotonic(), 0.0
    for step in steps:
        planned += step.budget
        result["running"] = step.name
        write_json(output / "gpu_check.json", result)
        limit = step_limit(step, planned, time.monotonic() - start)
        print(f"{step.name} (up to {limit:.0f} s) ...", flush=True)
        record = run_step(step, output, args.dry_run, limit)
        print(f"{step.name}: {record['status']}, {record['seconds']:.1f} s", flush=True)
        result["steps"].append(record)
        result["running"] = None
        write_json(output / "gpu_check.json", result)
    summary = format_summary(result)
    (output / "gpu_check.md").write_text(summary, encoding="utf-8")
    print(f"\n{summary}\nWrote {output}: gpu_check.json, gpu_check.md")
    return int(any(record["status"] not in ("passed", "skipped") for record in result["steps"]))


def step_limit(step: Step, planned: float, elapsed: float) -> float:
    """Return the seconds that a step may take: its budget and what earlier steps left of theirs.

    Args:
        step: the step.
        planned: sum of the budgets up to and with this step.
        elapsed: seconds since the start of the first step.
    """
    return max(1.0, min(planned, TIME_LIMIT) - elapsed)
