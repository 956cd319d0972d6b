"""Reads all images of a dataset ahead of time, as training will."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

from halodet.data.coco import LEFT_OUT, Fault, ValidatedCoco
from halodet.data.image_io import read_image
from halodet.errors import DatasetError, ImageError

from tqdm import tqdm

_CHUNK = 16  # images handed to a process at a time
_WORTH_A_PROCESS = 200  # images read in the seconds that starting another process takes


class CheckStopped(KeyboardInterrupt):
    """Ctrl-C while images were read.

    Attributes:
        faults: those found until then.
        read: how many images were read.
    """

    def __init__(self, faults: list[Fault], read: int) -> None:
        super().__init__(f"stopped after {read} images")
        self.faults, self.read = faults, read


def check_images(checked: ValidatedCoco, image_dir: str | Path, *, processes: int | None = None) -> list[Fault]:
    """Decode every image of a checked json to its last pixel, and list those that training would leave out.

    Args:
        checked: what :func:`validate_coco` returned.
        image_dir: the folder that the json's file names are relative to.
        processes: how many read at the same time; None for one for each core, or fewer where there are few images.

    Returns:
        One fault for each bad image, in the json's order.

    Raises:
        DatasetError: a process was killed while it read, by a lack of memory, say.
        CheckStopped: on Ctrl-C.
    """
    images = checked.dataset["images"]
    read = partial(_problem, Path(image_dir))
    processes = processes or min(_cores(), 1 + len(images) // _WORTH_A_PROCESS)
    bar = partial(tqdm, total=len(images), desc=f"reading images of {checked.json_file.name}", unit="image")
    problems: list[str | None] = []
    try:
        if processes == 1:
            with _interruptible() as asked:
                _append(problems, bar(map(read, images)), asked)
        else:
            # Not forked: a fork of a process in which libraries run threads may hang.
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                with _interrupts(
                    signal.SIG_IGN
                ):  # what is started now stays so, and does not print a traceback for each process
                    results = pool.map(read, images, chunksize=_CHUNK)
                try:
                    with _interruptible() as asked:
                        _append(problems, bar(results), asked)
                except KeyboardInterrupt:
                    pool.shutdown(wait=False, cancel_futures=True)  # else all that is handed out would be read first
                    raise
    except BrokenProcessPool as error:
        raise DatasetError(
            f"a process ended while it read images of {checked.json_file}, for lack of memory or in a decoder: "
            "try again with --processes 1, which stops at the image"
        ) from error
    except KeyboardInterrupt:
        raise CheckStopped(_faults(checked, images, problems), len(problems)) from None
    return _faults(checked, images, problems)


def _append(problems: list[str | None], found: Iterable[str | None], asked: threading.Event) -> None:
    for problem in found:  # one by one: what there is on Ctrl-C counts
        problems.append(problem)
        if asked.is_set():
            raise KeyboardInterrupt


def _faults(checked: ValidatedCoco, images: list[dict[str, Any]], problems: list[str | None]) -> list[Fault]:
    return [
        Fault(checked.json_file.name, f"image {image['id']}", problem, LEFT_OUT)
        for image, problem in zip(images, problems, strict=False)
        if problem
    ]


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Have Ctrl-C raise KeyboardInterrupt, and remember it: Python drops one that comes while an object is being removed, for example."""
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()
        raise KeyboardInterrupt

    with _interrupts(stop):
        yield asked


@contextlib.contextmanager
def _interrupts(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Have Ctrl-C do this, here and, where it is to do nothing, in the processes started here."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _problem(image_dir: Path, image: dict[str, Any]) -> str | None:
    path = image_dir / image["file_name"]
    try:
        height, width = read_image(path).shape[:2]
    except ImageError as error:
        return str(error).rstrip(".")
    if (width, height) != (image["width"], image["height"]):
        return f"{path} is {width} x {height} pixels (upright), and {image['width']} x {image['height']} in the json"
    return None
