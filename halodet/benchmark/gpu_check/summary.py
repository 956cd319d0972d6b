"""The plan and the table of results as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halodet.benchmark.gpu_check.steps import Step

from tabulate import tabulate

MAX_FAILURES = 30  # listed below the table


def format_plan(steps: Sequence[Step], dry_run: bool) -> str:
    """Return order and budgets of the steps."""
    rows = [[i, step.name, f"{step.budget:.0f} s"] for i, step in enumerate(steps, 1)]
    total = f"{'Dry run on the CPU. ' if dry_run else ''}{sum(step.budget for step in steps):.0f} s in all."
    return f"{tabulate(rows, ['', 'step', 'budget'], tablefmt='github')}\n\n{total}\n"


def format_summary(result: dict[str, Any]) -> str:
    """Return a table with one row per step, followed by what failed and what a dry run replaced."""
    rows, failures, stand_ins = [], [], []
    for record in result["steps"]:
        counts = ", ".join(f"{count} {status}" for status, count in record["counts"].items())
        worst = f"{record['worst']:.4g} {record['measure']}" if record["worst"] is not None else ""
        rows.append([record["name"], record["status"], f"{record['seconds']:.1f}", counts, worst])
        stand_ins += [f"{record['name']}: {text}" for text in record["stand_ins"]]
        failed = [(name, item) for name, item in record["items"].items() if item["status"] == "failed"]
        failures += [f"{record['name']}: {name}: {item['failed']}" for name, item in failed]
        if record["status"] not in ("passed", "skipped") and not failed:
            failures.append(f"{record['name']}: {record['status']}; {(record['last_lines'] or ['no output'])[-1]}")
        for name, item in record["items"].items():
            failures += [f"{record['name']}: {name}: {text}" for text in item.get("errors", ())]
    more = [f"... and {len(failures) - MAX_FAILURES} more"] if len(failures) > MAX_FAILURES else []
    table = tabulate(rows, ["step", "status", "seconds", "items", "worst"], tablefmt="github", disable_numparse=True)
    parts = [describe_environment(result), table]
    lists = {"Failures and errors": failures[:MAX_FAILURES] + more, "Replaced in this dry run": stand_ins}
    for title, lines in lists.items():
        if lines:
            parts.append("\n".join([f"{title}:", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def describe_environment(result: dict[str, Any]) -> str:
    """Return what the step "versions" found, in one line."""
    found = [record["items"] for record in result["steps"] if record["name"] == "versions"]
    items = found[0] if found else {}
    return ", ".join(f"{name} {item['value']}" for name, item in items.items() if "value" in item)
