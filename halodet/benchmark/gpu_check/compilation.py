"""Compile all tilings in parallel into the cache that the other steps use."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any

from halodet.benchmark.gpu_check.child import Items
from halodet.benchmark.gpu_check.compile_worker import Task, work
from halodet.benchmark.gpu_check.context import Context

_LIST_SECONDS = 60  # to import and list the tasks


class Worker:
    """A process that compiles one task after the other."""

    def __init__(self, dry_run: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, dry_run), daemon=True)
        self.process.start()
        other.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        self.connection.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def items(context: Context) -> Items:
    if context.dry_run:
        context.replace("GPU: kernels are compiled for sm_90, registers are those that cuobjdump reports")
    # The workers compile, also where this process interprets.
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        count = 1 if context.dry_run else max(1, min(len(os.sched_getaffinity(0)) - 1, 15))
        workers = [Worker(context.dry_run) for _ in range(count)]
        try:
            yield from _compile_all(workers, context)
        finally:
            for worker in workers:
                worker.stop()
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def _compile_all(workers: list[Worker], context: Context) -> Items:
    workers[0].connection.send(None)
    if not workers[0].connection.poll(min(_LIST_SECONDS, max(context.time_left(), 0))):
        raise TimeoutError("the list of tilings took too long")
    tasks: list[Task] = workers[0].connection.recv()
    start = time.monotonic()
    for task, result in _results(workers, tasks, context):
        yield str(task), _returning(result)
    total = round(time.monotonic() - start, 1)
    yield "all tilings", _returning({"seconds": total, "processes": len(workers), "tilings": len(tasks)})


def _results(workers: list[Worker], tasks: list[Task], context: Context) -> Iterator[tuple[Task, dict[str, Any]]]:
    waiting = tasks[::-1]
    for worker in workers:
        if waiting:
            worker.give(waiting.pop())
    while any(worker.task for worker in workers):
        busy: dict[Any, int] = {worker.connection: i for i, worker in enumerate(workers) if worker.task}
        ready = wait(list(busy), timeout=max(0.0, context.time_left()))
        if not ready:
            break
        for connection in ready:
            index = busy[connection]
            task: Any = workers[index].task
            try:
                yield task, workers[index].connection.recv()
            except (EOFError, OSError):
                workers[index].process.join()
                code = workers[index].process.exitcode
                yield task, {"failed": f"the compiler ended its process with code {code}"}
                workers[index] = Worker(context.dry_run)
            workers[index].task = None
            if waiting and context.time_left() > 0:
                workers[index].give(waiting.pop())
    # The deadline has passed: these are recorded as not run.
    for task in [*(worker.task for worker in workers if worker.task), *reversed(waiting)]:
        yield task, {"status": "not run"}


def _returning(result: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    return lambda: result
