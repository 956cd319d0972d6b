"""Decode all images of a dataset before training, in several processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

from halodet.data.coco import ValidatedCoco
from halodet.data.coco_validator import SKIPPED_IN_TRAINING
from halodet.data.issues import Issue
from halodet.errors import DatasetError, ImageError
from halodet.utils.image_io import read_image

from tqdm import tqdm

_CHUNK = 16  # images sent to a process at a time
_IMAGES_PER_PROCESS = 200  # with fewer images, starting another process takes longer than reading them
_POLL_PERIOD = 0.2  # seconds


class CheckInterrupted(KeyboardInterrupt):
    """Ctrl-C while images were read.

    Attributes:
        issues: issues found so far.
        num_read: number of images read so far.
    """

    def __init__(self, issues: list[Issue], num_read: int) -> None:
        super().__init__(f"interrupted after {num_read} images")
        self.issues, self.num_read = issues, num_read


def check_images(dataset: ValidatedCoco, *, processes: int | None = None) -> list[Issue]:
    """Decode every image of a validated dataset completely, and list those that training would skip.

    Args:
        dataset: result of :func:`halodet.data.coco.validate_coco`.
        processes: number of processes; by default one per CPU, or fewer if there are few images.

    Returns:
        One issue per bad image, in the order of the json.

    Raises:
        DatasetError: a process was killed, by a lack of memory for example.
        CheckInterrupted: on Ctrl-C.
    """
    images, name = dataset.dataset["images"], dataset.json_file.name
    processes = processes or min(_num_cpus(), 1 + len(images) // _IMAGES_PER_PROCESS)
    errors: list[str | None] = []
    # A flag, not an exception: KeyboardInterrupt may be raised anywhere, also where Python discards it.
    interrupted = threading.Event()
    if processes == 1:
        found = (_find_error(dataset.image_dir, image) for image in images)
    else:
        found = _read_in_pool(dataset.image_dir, images, processes, interrupted)
    with _handle_interrupts(lambda number, frame: interrupted.set()):
        try:
            with (
                contextlib.closing(found),
                tqdm(total=len(images), desc=f"reading images of {name}", unit="image") as bar,
            ):
                for error in found:
                    errors.append(error)
                    bar.update()
                    if interrupted.is_set():
                        break
        except BrokenProcessPool as error:
            raise DatasetError(
                f"a process was killed while reading images of {dataset.json_file} (out of memory, or a crash in a "
                "decoder). Fix: find the image with --processes 1, which stops at it."
            ) from error
    issues = [
        Issue(name, f"image {image['id']}", error, SKIPPED_IN_TRAINING, image["id"])
        for image, error in zip(images, errors, strict=False)
        if error
    ]
    if interrupted.is_set():
        raise CheckInterrupted(issues, len(errors))
    return issues


def _read_in_pool(
    image_dir: Path, images: list[dict[str, Any]], processes: int, interrupted: threading.Event
) -> Iterator[str | None]:
    """Yield the result of each image; stop early if ``interrupted`` is set."""
    # "fork" may hang in a process whose libraries run threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        with _handle_interrupts(
            signal.SIG_IGN
        ):  # inherited by the processes started here, which would print a traceback each
            chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
            futures = deque(pool.submit(_find_errors, image_dir, chunk) for chunk in chunks)
        try:
            while futures and not interrupted.is_set():
                with contextlib.suppress(TimeoutError):
                    errors = futures[0].result(timeout=_POLL_PERIOD)
                    futures.popleft()
                    yield from errors
        finally:
            pool.shutdown(cancel_futures=True)


def _find_errors(image_dir: Path, images: list[dict[str, Any]]) -> list[str | None]:
    return [_find_error(image_dir, image) for image in images]


def _find_error(image_dir: Path, image: dict[str, Any]) -> str | None:
    path = image_dir / image["file_name"]
    try:
        height, width = read_image(path).shape[:2]
    except ImageError as error:
        return str(error).rstrip(".")
    if (width, height) != (image["width"], image["height"]):
        expected = f"{image['width']} x {image['height']}"
        return f"{path} is {width} x {height} pixels after EXIF rotation, expected {expected} from the json"
    return None


@contextlib.contextmanager
def _handle_interrupts(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Set the handler of SIGINT; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
