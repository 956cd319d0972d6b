"""A process that compiles kernels on request."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from halodet.attention import triton_ops
from halodet.benchmark.gpu_check.cases import AttentionCase, attend, correctness_cases, matmul_precision
from halodet.benchmark.gpu_check.child import describe_error
from halodet.benchmark.gpu_check.tilings import Launch, describe, load, record_launches

import torch


class Task(NamedTuple):
    """One tiling of a kernel for the constants of a case."""

    case: AttentionCase
    launch: int  # index among the launches of the case
    tiling: int
    title: str

    def __str__(self) -> str:
        return f"{self.title} | {self.case}"


class _Driver:
    """Stand-in for the driver of a GPU: enough to compile."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def work(connection: Connection, dry_run: bool) -> None:
    """Answer None with the list of tasks, and a task with its result."""
    torch.set_num_threads(1)
    if dry_run:
        from triton.runtime import driver

        driver.set_active(_Driver())
        triton_ops.triton_unavailable_reason = lambda device: None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(list_tasks(dry_run) if task is None else compile_task(task, dry_run))


def compile_cases(dry_run: bool) -> list[AttentionCase]:
    """Return the cases to compile for."""
    return [AttentionCase(8, 3, "bfloat16", extra=2)] if dry_run else correctness_cases(dry_run)


def list_tasks(dry_run: bool) -> list[Task]:
    """Return all tasks, in the order in which later steps need them."""
    tasks = []
    for case in compile_cases(dry_run):
        for i, launch in enumerate(find_launches(case, dry_run)):
            tilings = launch.tilings()[: 1 if dry_run else None]
            tasks += [Task(case, i, j, f"{launch.name} {describe(tiling)}") for j, tiling in enumerate(tilings)]
    return tasks


@functools.lru_cache(2)
def find_launches(case: AttentionCase, dry_run: bool) -> list[Launch]:
    """Return the launches of the forward and the backward of a case."""
    inputs = case.make_inputs(torch.device("cpu" if dry_run else "cuda"))
    with matmul_precision(case.type == "tf32"):
        return record_launches(lambda: attend(triton_ops.halo_attention_triton, inputs, case.layout(), case.dtype))


def compile_task(task: Task, dry_run: bool) -> dict[str, Any]:
    """Compile; return the seconds it took, registers, spilled registers and shared memory, or the error."""
    start = time.monotonic()
    try:
        launch = find_launches(task.case, dry_run)[task.launch]
        start = time.monotonic()
        kernel = launch.compile(launch.tilings()[task.tiling])
        figures = {"compile_seconds": round(time.monotonic() - start, 2), "shared_bytes": kernel.metadata.shared}
        figures |= _count_registers(kernel) if dry_run else _load(kernel)
        return {**figures, "worst": figures["spills"]}
    except Exception as error:  # the result of this tiling
        if type(error).__name__ == "OutOfResources":  # the autotuner drops it too
            return {"status": "skipped", "reason": describe_error(error)}
        return {"failed": describe_error(error), "compile_seconds": round(time.monotonic() - start, 2)}


def _load(kernel: Any) -> dict[str, int]:
    """Return what the driver reports."""
    load(kernel)
    return {"registers": kernel.n_regs, "spills": kernel.n_spills, "max_threads": getattr(kernel, "n_max_threads", 0)}


def _count_registers(kernel: Any) -> dict[str, int]:
    """Return what cuobjdump reports."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    handle, name = tempfile.mkstemp(suffix=".cubin")
    try:
        os.write(handle, kernel.asm["cubin"])
        os.close(handle)
        printed = subprocess.run([tool, "-res-usage", name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(name)
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", printed)
    return {"registers": int(registers), "spills": int(stack) // 4}
