"""Arguments, tables and files shared by the benchmark tools."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halodet.benchmark.chart import draw_ratios
from halodet.benchmark.gpu_timing import EVENTS, GRAPH, REPETITIONS
from halodet.utils.io import write_json

import torch


def int_tuple(separator: str, *minimum: int) -> Callable[[str], tuple[int, ...]]:
    """Return an argparse type for integers joined by ``separator``, each at least its ``minimum``."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(separator)
        if len(parts) != len(minimum) or not all(part.isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is invalid: expected {len(minimum)} integers, {separator!r} between"
            )
        values = tuple(map(int, parts))
        if any(value < least for value, least in zip(values, minimum, strict=True)):
            raise argparse.ArgumentTypeError(
                f"{text!r} is invalid: expected at least {separator.join(map(str, minimum))}"
            )
        return values

    return parse


def positive_int(text: str) -> int:
    """Parse an integer of at least 1; an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected an integer of at least 1")
    return int(text)


def device(text: str) -> torch.device:
    """Parse ``cpu``, ``cuda`` or ``cuda:N`` of an existing GPU; an argparse type."""
    kind, _, index = text.partition(":")
    count = torch.cuda.device_count()
    if text != "cpu" and (kind != "cuda" or not (index or "0").isdecimal() or int(index or 0) >= count):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected cpu or cuda[:N] with N below {count}")
    return torch.device(text)


def output_folder(text: str) -> Path:
    """Create a writable folder; an argparse type."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a writable folder: {error.strerror}") from error
    if not os.access(text, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a writable folder")
    return Path(text)


def add_common_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add --device, --rounds, --memory and --output."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help=f"cpu or cuda[:N] (default: {default})")
    parser.add_argument(
        "--rounds", type=positive_int, default=7, help="timed calls of each implementation (default: 7)"
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory (on the CPU a new process for each)")
    parser.add_argument("--output", type=output_folder, default=output, metavar="FOLDER", help=f"(default: {output})")


def describe_machine(device: torch.device) -> str:
    """Return device, PyTorch and Python version in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, PyTorch {torch.__version__}, Python {platform.python_version()}"


def describe_timing(device: torch.device, rounds: int, use_graph: bool) -> str:
    """Return what :func:`~halodet.benchmark.measure.compare` measures, in one line."""
    if device.type != "cuda":
        return f"median of {rounds} rounds"
    return (
        f"median of {rounds} rounds of {REPETITIONS} calls, {GRAPH if use_graph else EVENTS}, L2 cache flushed before "
        f"each call"
    )


def format_figures(figures: dict[str, Any]) -> str:
    """Format time, ratio and memory of one implementation for a table cell."""
    for state in ("failed", "skipped"):
        if state in figures:
            return state
    # Attention on small maps takes microseconds on a GPU.
    digits = 3 if figures.get("ms", 1.0) < 1 else 1
    time = f"{figures['ms']:.{digits}f} ms" if "ms" in figures else ""
    if "not_captured" in figures:
        time += " [with launch overhead]"
    ratio = f" ({figures['ratio']:.2f}×)" if "ratio" in figures else ""
    memory = f"{figures['peak_mib']:.0f} MiB" if "peak_mib" in figures else ""
    return ", ".join(filter(None, (time + ratio, memory)))


def save_results(folder: Path, title: str, results: dict[str, Any]) -> None:
    """Write results.json; called after every measurement, so that an interrupted run keeps its results."""
    write_json(folder / "results.json", {"machine": title, "results": results})


def write_report(folder: Path, title: str, table: str, panels: dict[str, Any], reference: str) -> None:
    """Print the table and write table.md and ratios.png to ``folder``; ``panels`` as in :func:`draw_ratios`."""
    print(table)
    (folder / "table.md").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
    draw_ratios(panels, title, folder / "ratios.png", f"time / time of {reference} (below 1: faster than {reference})")
    print(f"Wrote {folder}: results.json, table.md, ratios.png")
