"""Helpers that several test files share. Everything heavy is imported where it is used."""

from __future__ import annotations

import functools
import importlib.util
import json
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def load_tool(name: str) -> ModuleType:
    """Import ``tools/<name>.py`` as a module, so that its ``main`` can be called in process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _load_config(name: str, opts: tuple[str, ...]) -> Any:
    from halodet.config.load import load_config

    return load_config(name, opts)


def cached_config(name: str, *opts: object) -> Any:
    """``load_config(name, opts)``, parsed once per process; returns a clone that the test may change."""
    return _load_config(name, tuple(map(str, opts))).clone()


def run_python(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with ``arguments`` from the repository's root: one thread, no GPU, output captured as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def fork(function: Callable[..., int | None], *arguments: object, printed: Path, **environment: str) -> Any:
    """Start ``function`` in a process that has imported everything; its result is the exit code.

    It is forked from a server that has only imported modules: this saves most of the start of a Python process and,
    unlike a fork of this process, copies no threads.

    Args:
        function: function of an importable module.
        arguments: its arguments.
        printed: file to which everything printed is appended.
        environment: environment variables of the process.

    Returns:
        The multiprocessing.Process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["halodet.engine.main"])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    process = context.Process(target=_enter, args=(function, arguments, printed, environment))
    process.start()
    return process


def _enter(function: Callable[..., int | None], arguments: tuple[Any, ...], printed: Path, environment: Any) -> None:
    os.environ.update(environment)
    os.chdir(ROOT)
    opened = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(opened, descriptor)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its data loading workers
    sys.exit(function(*arguments))


_TORCH_SERVER = """
import json, os, sys, traceback
import torch, torch._dynamo
print("ready", flush=True)
for line in sys.stdin:
    code, path, environment, output = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.update(environment)
        sys.path[:0] = path
        status = 1
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _torch_server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, "-c", _TORCH_SERVER], stdin=-1, stdout=-1, text=True)
    assert server.stdout.readline() == "ready\n"
    return server


def run_code(code: str, folder: Path, *path: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process that has imported torch and nothing else of what the tests use.

    It is forked from a server, which saves the seconds that importing torch takes.

    Args:
        code: Python code.
        folder: folder for the output.
        path: folders at the start of ``sys.path``.
        environment: further environment variables.
    """
    server, output = _torch_server(), folder / "output"
    print(json.dumps([code, list(map(str, path)), environment, str(output)]), file=server.stdin, flush=True)
    printed = int(server.stdout.readline())
    texts = [Path(f"{output}.{stream}").read_text() for stream in (1, 2)]
    return subprocess.CompletedProcess(code, printed, *texts)


def run_tool(name: str, arguments: list[str]) -> int:
    """Run ``tools/<name>.py``; returns its exit code."""
    return load_tool(name).main(arguments)


def run_ranks(
    function: Callable[..., int | None], *arguments: object, printed: Path, timeout: float = 240
) -> tuple[list[int | None], str]:
    """Run ``function`` in two processes with the environment that torchrun gives them; see :func:`fork`.

    Returns:
        The exit code of each rank (None after ``timeout`` seconds), and everything printed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        fork(function, *arguments, printed=printed, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in (0, 1)
    ]
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes, printed.read_text()


@contextmanager
def registered(name: str, json_file: str | os.PathLike, images: str | os.PathLike) -> Iterator[str]:
    """Register a COCO dataset with Detectron2 for the duration of the block."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances(name, {}, str(json_file), str(images))
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def dataset_flags(root: Path, count: int) -> list[str]:
    """Draw ``count`` scenes below ``root``; returns the flags that train and evaluate on them."""
    from halodet.data import write_shapes

    json_file = write_shapes(root, "train", count)
    return [
        f"--{split}-{k}={v}" for split in ("train", "val") for k, v in (("json", json_file), ("images", root / "train"))
    ]


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.json."""
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def assert_same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Assert that two state dicts have the same names, types and bits."""
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Paths of the entries in which two nested checkpoints differ."""
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return [] if same else [path]
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        return [found for key in left for found in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, list | tuple):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{path}.{i}")]
    return [] if left == right else [path]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image (height, width, 3) of uniform noise, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def truncate(path: Path, share: float = 0.5) -> None:
    """Cut a file to the first ``share`` of its bytes."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def png(width: int, height: int, data: bytes, bit_depth: int = 8, color_type: int = 0) -> bytes:
    """A PNG file with the given header and uncompressed ``data``, which need not fit together."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


class CreatesFile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")
