"""Versions, driver and limits of the GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import partial
from typing import Any

from halodet.attention.triton_ops import triton_unavailable_reason
from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.context import Context, Skipped

import torch

PACKAGES = ("halodet", "torch", "torchvision", "triton", "detectron2", "timm", "halonet-pytorch")
PROPERTIES = (
    "name",
    "total_memory",
    "multi_processor_count",
    "shared_memory_per_block",
    "shared_memory_per_block_optin",
    "shared_memory_per_multiprocessor",
    "regs_per_multiprocessor",
    "L2_cache_size",
)


def items(context: Context) -> Items:
    yield "Python", lambda: {"value": platform.python_version()}
    for name in PACKAGES:
        yield name, partial(_find_version, name)
    yield "CUDA", lambda: {"value": str(torch.version.cuda)}
    yield "driver", lambda: {"value": _driver()}
    yield "C compiler", lambda: {"value": _compiler()}
    yield "GPU", lambda: _describe_gpu(context)
    yield "Triton backend", lambda: _check_backend(context)


def _find_version(name: str) -> dict[str, Any]:
    try:
        return {"value": importlib.metadata.version(name)}
    except importlib.metadata.PackageNotFoundError:
        return {"value": "not installed"}


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        raise Skipped("nvidia-smi is not on the PATH")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]


def _compiler() -> str:
    """Triton compiles a launcher at its first use."""
    path = next(filter(None, (shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang", "cc"))), None)
    if path is None:
        raise FileNotFoundError("no C compiler is on the PATH, expected gcc or clang. Fix: install one or set CC.")
    return path


def _describe_gpu(context: Context) -> dict[str, Any]:
    if context.dry_run:
        context.replace("GPU properties: none")
        raise Skipped("a dry run uses no GPU")
    gpu = torch.cuda.get_device_properties(context.device)
    properties = {name: getattr(gpu, name) for name in PROPERTIES if hasattr(gpu, name)}
    free, total = torch.cuda.mem_get_info()
    # Driver's limits as Triton reads them.
    from triton.runtime import driver

    limits = driver.active.utils.get_device_properties(torch.cuda.current_device())
    value = f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})"
    return {"value": value, **properties, "free_memory": free, "memory": total, "triton": limits}


def _check_backend(context: Context) -> dict[str, Any]:
    reason = triton_unavailable_reason(context.device)
    if reason:
        return {"failed": reason}
    return {"value": "interpreted" if context.dry_run else "usable"}
