#!/usr/bin/env python3
"""Check halodet on an NVIDIA GPU in under 8 minutes: Triton tests, benchmarks in bfloat16 and float32, training.

    python tools/gpu_check.py                        # or: make gpu-check

Writes gpu_check.json, gpu_check.md (one table with versions and device) and a log per step to --output. Steps run in
processes of their own with a time limit; a failed step is recorded and the others continue. Needs no network.

Exit codes: 0 all steps passed, 1 a step failed, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from halodet.benchmark.attention import IMPLEMENTATIONS, MODES, is_installed
from halodet.benchmark.report import format_figures, output_folder
from halodet.utils.io import write_json

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 470  # seconds for all steps together
DTYPES = ("bfloat16", "float32")
PACKAGES = ("halodet", "torch", "torchvision", "triton", "detectron2", "timm", "halonet-pytorch")


class Step(NamedTuple):
    """A command with a time limit in seconds."""

    name: str
    command: list[str]
    timeout: float
    results: Path | None = None  # JSON file that it writes


def make_steps(output: Path, device: str) -> list[Step]:
    """Return the steps; on a CPU (tests) the same ones at their smallest sizes."""
    gpu = device != "cpu"
    python = sys.executable
    workers = ["-n", "4"] if gpu and importlib.util.find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", "-m", "triton", "tests/attention", *workers]
    attention = ["--size", "800x1333", "--stride", "8", "16", "--batch", "2", "--block", "8,3", "--memory"]
    models = ["--models", "mask_rcnn_halo_h4", "mask_rcnn_r50", "R50-FPN", "--batch", "2", "--memory"]
    rounds, iterations = ["--rounds", "10"], "50"
    if not gpu:
        pytest += ["-k", "unsupported"]
        attention = ["--map", "64x5x6", "--block", "4,1", "--implementations", "halodet"]
        models = ["--config-file", "quick/mask_rcnn_halo_small", "--kind", "backbone", "--size", "32x32"]
        models += ["--models"]  # no others
        rounds, iterations = ["--rounds", "1"], "2"
    steps = [Step("Triton tests", pytest, 150)]
    for tool, options, timeout in (("attention", attention, 60), ("model", models, 75)):
        for dtype in DTYPES:
            folder = output / f"{tool}_{dtype}"
            command = [python, f"tools/benchmark_{tool}.py", *options, *rounds, "--dtype", dtype, "--device", device]
            command += ["--output", str(folder)]
            steps.append(Step(f"{tool} benchmark, {dtype}", command, timeout, folder / "results.json"))
    train = [python, "tools/train_net.py", "--config-file", "quick/mask_rcnn_halo_shapes"]
    train += ["MODEL.DEVICE", device, "SOLVER.MAX_ITER", iterations, "DATASETS.TEST", "()"]
    train += ["OUTPUT_DIR", str(output / "train")]
    if not gpu:
        train += ["MODEL.HALONET.BASE_WIDTH", "16", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "1"]
    return [*steps, Step(f"training, {iterations} iterations", train, 120, output / "train" / "metrics.json")]


def run_command(command: list[str], log: Path, timeout: float) -> int | None:
    """Run a command with its output in ``log``; return its exit code, or None if it timed out."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes it started
            process.wait()
            return None


def run_step(step: Step, output: Path, time_left: float) -> dict[str, Any]:
    """Run a step and return its exit code, time, last lines and results."""
    log = output / f"{step.name.replace(', ', '_').replace(' ', '_')}.log"
    for old in (log, step.results):
        if old:
            old.unlink(missing_ok=True)
    start = time.monotonic()
    exit_code = run_command(step.command, log, max(1.0, min(step.timeout, time_left)))
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    status = "passed" if exit_code == 0 else "timed out" if exit_code is None else f"failed (exit code {exit_code})"
    return {
        "name": step.name,
        "command": step.command,
        "status": status,
        "exit_code": exit_code,
        "seconds": round(time.monotonic() - start, 1),
        "last_lines": lines[-15:],
        "results": _read_results(step.results),
    }


def _read_results(path: Path | None) -> Any:
    try:
        text = path.read_text(encoding="utf-8") if path else ""
        # metrics.json has one document per line; the last one is the result.
        return json.loads(text.splitlines()[-1] if path and path.name == "metrics.json" else text)
    except (OSError, ValueError, IndexError):
        return None


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return versions and device."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        versions["device"] = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory >> 30} GiB"
    return {"Python": sys.version.split()[0], "CUDA": str(torch.version.cuda), "device": "cpu", **versions}


def make_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the table rows of a step: its status and its results."""
    results = record["results"]
    detail = "" if record["exit_code"] == 0 else (record["last_lines"] or ["no output"])[-1]
    rows = [
        [record["name"], "", "", "", "", f"{record['status']}, {record['seconds']:.0f} s", detail.replace("|", "/")]
    ]
    if not results:
        return rows
    if "total_loss" in results:
        rows[0][1] = f"loss {results['total_loss']:.2f}, {results.get('time', float('nan')):.3f} s per iteration"
    elif record["name"].startswith("attention"):
        for case, by_mode in results["results"].items():
            for name in IMPLEMENTATIONS:
                figures = [by_mode[mode].get(name, {}) for mode in MODES]
                cells = [format_figures(x) for x in figures]
                absent = "" if any(figures) else "not run" if is_installed(name) else "not installed"
                rows.append(["", case, name, *cells, absent, _errors(*figures)])
    else:
        for kind, by_name in results["results"].items():
            for name, result in by_name.items():
                figures = [result.get(column, {}) for column in ("forward", "training", "memory")]
                cells = [format_figures(figures[0]), ", ".join(filter(None, map(format_figures, figures[1:])))]
                rows.append(["", kind, name, *cells, "", _errors(result, *figures)])
    return rows


def _errors(*figures: dict[str, Any]) -> str:
    return "; ".join(x["failed"].replace("|", "/") for x in figures if "failed" in x)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_folder, default="output/gpu_check", metavar="FOLDER")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: smallest sizes, for tests
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        print(f"error: no NVIDIA GPU is available to PyTorch {torch.__version__}", file=sys.stderr)
        return 2
    output = args.output.resolve()
    environment = describe_environment(torch.device(args.device))
    records: list[dict[str, Any]] = []
    start = time.monotonic()
    for step in make_steps(output, args.device):
        print(f"{step.name} ...", flush=True)
        record = run_step(step, output, TIME_LIMIT - (time.monotonic() - start))
        print(f"{step.name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
        records.append(record)
        write_json(output / "gpu_check.json", {"environment": environment, "steps": records})
    rows = [row for record in records for row in make_rows(record)]
    headers = ["step", "case", "implementation", MODES[0], f"{MODES[1]} / training step", "status", "error"]
    versions = ", ".join(f"{name} {version}" for name, version in environment.items())
    report = f"{versions}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n"
    (output / "gpu_check.md").write_text(report, encoding="utf-8")
    print(f"{report}\nWrote {output}: gpu_check.json, gpu_check.md")
    return int(any(record["exit_code"] != 0 for record in records))


if __name__ == "__main__":
    sys.exit(main())
