"""NVIDIA's compute-sanitizer on a small case: accesses out of bounds and races in shared memory.

As a script, run that case.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from halodet.attention.triton_ops import halo_attention_triton
from halodet.benchmark.gpu_check.cases import SMALL, AttentionCase, attend
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context, Skipped
from halodet.benchmark.gpu_check.runner import run_command
from halodet.benchmark.gpu_check.tilings import limit_tilings

import torch

TOOLS = ("memcheck", "racecheck")
ELSEWHERE = "/usr/local/cuda/bin/compute-sanitizer"
ERROR_CODE = 9
CASE = AttentionCase(8, 3, "bfloat16", False, stride=2, extra=5)  # compiled by the step "compilation"


def items(context: Context) -> Items:
    for i, tool in enumerate(TOOLS):
        yield tool, partial(check, tool, context, len(TOOLS) - i)


def check(tool: str, context: Context, remaining: int) -> dict[str, Any]:
    """Run the case under a tool, in an equal share of the time left; return its number of errors."""
    program = shutil.which("compute-sanitizer") or (ELSEWHERE if Path(ELSEWHERE).exists() else None)
    command = [sys.executable, "-m", __name__]
    if context.dry_run:
        context.replace("compute-sanitizer: the case alone")
        command.append("cpu")
    elif program is None:
        raise Skipped("compute-sanitizer is not on the PATH")
    else:
        command = [program, "--tool", tool, "--error-exitcode", str(ERROR_CODE), *command]
    # PyTorch's cache of memory blocks would hide accesses beyond the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = context.output / f"{tool}.log"
    log.unlink(missing_ok=True)
    code = run_command(command, log, max(1.0, context.time_left() / remaining), environment)
    printed = log.read_text(encoding="utf-8", errors="replace")
    print(printed)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    figures: dict[str, Any] = {"worst": int(summary[-1]) if summary else 0, "exit_code": code}
    if code is None:
        figures["failed"] = "timed out"
    elif code or figures["worst"]:
        lines = printed.strip().splitlines() or ["no output"]
        figures["failed"] = next((line for line in lines if "Invalid" in line or "hazard" in line), lines[-1])
    return figures


def main(device: str = "cuda") -> None:
    """Run forward and backward once with the first tilings."""
    limit_tilings(1)
    case = SMALL if device == "cpu" else CASE
    inputs = [None if x is None else x.to(device) for x in case.make_inputs(torch.device("cpu"))]
    attend(halo_attention_triton, inputs, case.layout(), case.dtype)
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
