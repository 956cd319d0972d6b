"""Inference on image files: find them, draw the predictions, and save these as COCO-style JSON."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from halodet.errors import ConfigError, HalodetError, ImageError
from halodet.inference.progress import progress_bar
from halodet.inference.result import Result
from halodet.utils.image_io import STDERR_LOCK, read_image
from halodet.utils.io import write_json

import numpy as np
from PIL import Image
from tqdm import tqdm

__all__ = ["DETECTIONS_FILE", "NOT_IMAGES", "ImagePredictor", "draw_images", "find_images"]

DETECTIONS_FILE = "detections.json"
_VIDEOS = frozenset((".avi", ".mkv", ".mov", ".mp4", ".webm"))
NOT_IMAGES = _VIDEOS | frozenset(
    ".bz2 .cfg .csv .doc .docx .gz .htm .html .ini .ipynb .json .jsonl .log .md .npy .npz .pdf .pickle .pkl .pth "
    ".pt .py .rst .sh .tar .tgz .toml .tsv .txt .xls .xlsx .xml .yaml .yml .zip".split()
)

_THREADS = 2  # that read, and that draw and write


class ImagePredictor(Protocol):
    """What :func:`draw_images` needs of a predictor; ``predict_batch(images)`` is used where there is one."""

    classes: list[dict[str, Any]]
    stuff_classes: list[str]

    def predict(self, image: Any, /) -> dict[str, Any]:
        """Return what the model predicts for an image."""


def find_images(inputs: Sequence[str], output: str | None = None, *, flag: str = "--input") -> list[str]:
    """List the files that ``inputs`` (files, folders, glob patterns) name, each once, sorted inside folders.

    Folders are searched with their subfolders, without hidden files and files with a suffix in :data:`NOT_IMAGES`.
    Errors name ``flag``.

    Raises:
        ConfigError: an input matches nothing or is a video, or a file is in the folder ``output``, where it could be
            overwritten.
    """
    found: dict[str, str] = {}
    for given in inputs:
        if os.path.isfile(given) and os.path.splitext(given)[1].lower() in _VIDEOS:
            raise ConfigError(f"{flag} {given} is invalid: expected images, not a video. Fix: --video {given}.")
        # A file whose name holds brackets or a star is that file, not a pattern.
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        files = [file for path in paths for file in (_walk(path, output) if os.path.isdir(path) else [path])]
        if not files:
            kind = "image" if paths else "file"
            raise ConfigError(f"{flag} {given} is invalid: it matches no {kind}. Fix: give image files or a folder.")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    for real, file in found.items():
        if output is not None and os.path.dirname(real) == os.path.realpath(output):
            raise ConfigError(
                f"--output {output} is invalid: a drawing could overwrite the input {file}. Fix: use another folder."
            )
    return list(found.values())


def draw_images(
    predictor: ImagePredictor,
    files: Sequence[str],
    output: str,
    *,
    threshold: float,
    absolute_paths: bool = False,
    batch_size: int = 1,
) -> int:
    """Draw the predictions for each file into the folder ``output``, and save them in :data:`DETECTIONS_FILE`.

    Images that cannot be read are reported and skipped. The predictions so far are saved whatever happens. In the JSON,
    ``file_name`` is relative to ``info.root``, the folder that contains all files. While an image is predicted, other
    threads read the next ones, and draw and write those before.

    Args:
        predictor: a :class:`~halodet.inference.Predictor` or :class:`~halodet.inference.ExportedPredictor`.
        files: paths of the images.
        output: an existing folder.
        threshold: minimum score.
        absolute_paths: write absolute paths as ``file_name``.
        batch_size: number of images that the model predicts at a time, if the predictor has ``predict_batch``.

    Returns:
        Exit code: 0, 1 if an image failed or cannot be written, 130 after Ctrl-C, or that of another expected error.
    """
    categories = [{"id": entry["id"], "name": entry["name"]} for entry in predictor.classes]
    root = "" if absolute_paths else _common_folder(files)
    coco: dict[str, Any] = {"info": {"root": root}, "images": [], "annotations": [], "categories": categories}
    drawings = _Drawings(predictor, output, threshold, coco)
    code = 0
    try:
        with progress_bar(len(files), "images", disable=len(files) < 2) as bar:
            drawings.run(files, batch_size if hasattr(predictor, "predict_batch") else 1, bar)
    except KeyboardInterrupt:
        code = 130
        _print("Stopped")
    except HalodetError as error:
        code = error.exit_code
        _print(str(error))
    except OSError as error:
        code = 1
        _print(f"--output {output} cannot be written to ({error.strerror or error}). Fix: use another folder.")
    finally:
        try:
            write_json(os.path.join(output, DETECTIONS_FILE), coco)
        except OSError as error:
            code = code or 1
            _print(f"{os.path.join(output, DETECTIONS_FILE)} cannot be written ({error.strerror or error}).")
    drawn, objects = len(coco["images"]), len(coco["annotations"])
    rest = len(files) - drawn - drawings.failed
    print(
        f"{drawn} drawn, {drawings.failed} failed{f', {rest} not processed' if rest else ''}, "
        f"{objects} object{'s' * (objects != 1)}: {output}"
    )
    if drawn and not objects and not predictor.stuff_classes:
        print(f"No object has a score of {threshold} or more. A lower --confidence-threshold shows others.")
    return code or int(drawings.failed > 0)


_Record = tuple[dict[str, Any], list[dict[str, Any]]]  # image and annotations in COCO's format


class _Drawings:
    """Reads, predicts and draws files, and records them in their order.

    Attributes:
        failed: number of images that cannot be read or predicted.
    """

    def __init__(self, predictor: ImagePredictor, output: str, threshold: float, coco: dict[str, Any]) -> None:
        self._predictor, self._output, self._threshold, self._coco = predictor, output, threshold, coco
        self._names = {DETECTIONS_FILE}
        self._drawing: deque[Future[_Record]] = deque()
        self.failed = 0

    def run(self, files: Sequence[str], batch_size: int, bar: tqdm) -> None:
        """Process the files; after an error, those that are being drawn are recorded before it is raised."""
        with ThreadPoolExecutor(_THREADS) as readers, ThreadPoolExecutor(_THREADS) as writers:
            try:
                reading = _read_ahead(files, readers, batch_size + _THREADS)
                while batch := list(itertools.islice(reading, batch_size)):
                    self._predict(batch, writers, bar)
                    # A drawing holds the masks of its image, so few of them wait.
                    while len(self._drawing) > max(_THREADS, batch_size) or (self._drawing and self._drawing[0].done()):
                        self._record(bar)
                while self._drawing:
                    self._record(bar)
            finally:
                readers.shutdown(wait=False, cancel_futures=True)
                while self._drawing:
                    with contextlib.suppress(OSError):  # one error is enough
                        self._record(bar)

    def _predict(self, batch: Sequence[tuple[str, Future[np.ndarray]]], writers: ThreadPoolExecutor, bar: tqdm) -> None:
        """Predict a batch, and start to draw it."""
        read: list[tuple[str, np.ndarray]] = []
        for file, future in batch:
            try:
                read.append((file, future.result()))
            except ImageError as error:
                self._fail(str(error), bar)
        try:
            if len(read) > 1:
                predictions = self._predictor.predict_batch([image for _, image in read])  # type: ignore[attr-defined]
            else:
                predictions = [self._predictor.predict(image) for _, image in read]
        except ImageError as error:
            for file, _ in read:
                self._fail(f"{file}: {error}", bar)
            return
        for (file, image), prediction in zip(read, predictions, strict=True):
            name = _unused_name(os.path.basename(file), self._names)
            self._names.add(name.casefold())
            self._drawing.append(writers.submit(self._draw, file, image, prediction, name))

    def _draw(self, file: str, image: np.ndarray, prediction: dict[str, Any], name: str) -> _Record:
        """Draw and write one image, in another thread."""
        result = Result.of(self._predictor, image, prediction, file).filter(self._threshold)
        # A rename replaces a link that has this name, which could lead to the input, and leaves no part of a file.
        path, part = os.path.join(self._output, name), os.path.join(self._output, f".{name}.part")
        try:
            result.draw().save(part, Image.registered_extensions()[os.path.splitext(name)[1].lower()], quality=95)
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)
        height, width = image.shape[:2]
        root, path = self._coco["info"]["root"], os.path.abspath(file)
        path = os.path.relpath(path, root).replace(os.sep, "/") if root else path
        return {"file_name": path, "width": width, "height": height, "drawing": name}, result.to_coco()

    def _record(self, bar: tqdm) -> None:
        """Record the first image that is being drawn, once its drawing exists."""
        wait(list(self._drawing)[:1])  # Ctrl-C while waiting leaves it in the queue
        image, annotations = self._drawing.popleft().result()
        images, recorded = self._coco["images"], self._coco["annotations"]
        images.append({"id": len(images) + 1, **image})
        for annotation in annotations:
            recorded.append({"id": len(recorded) + 1, **annotation, "image_id": images[-1]["id"]})
        bar.update()

    def _fail(self, message: str, bar: tqdm) -> None:
        self.failed += 1
        _print(message)
        bar.update()


def _read_ahead(
    files: Sequence[str], readers: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[str, Future[np.ndarray]]]:
    """Return files in order while at most ``ahead`` of them are being read."""
    reading: deque[tuple[str, Future[np.ndarray]]] = deque()
    for file in files:
        reading.append((file, readers.submit(read_image, file)))
        if len(reading) >= ahead:
            yield reading.popleft()
    while reading:
        yield reading.popleft()


def _common_folder(files: Sequence[str]) -> str:
    try:
        return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    except ValueError:  # on different drives of Windows
        return ""


def _unused_name(name: str, used: set[str]) -> str:
    """Return the name of a drawing: the image's, with .png appended unless it is JPEG or PNG, numbered if taken."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in (".jpg", ".jpeg", ".png"):
        stem, suffix = name, ".png"
    candidate, number = stem + suffix, 2
    while candidate.casefold() in used:  # some file systems ignore case
        candidate, number = f"{stem}_{number}{suffix}", number + 1
    return candidate


def _walk(folder: str, output: str | None) -> Iterator[str]:
    output = None if output is None else os.path.realpath(output)
    for root, folders, names in os.walk(folder):
        # The drawings of an earlier run are not inputs.
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(root, f)) != output
        )
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() not in NOT_IMAGES:
                yield os.path.join(root, name)


def _print(message: str) -> None:
    with STDERR_LOCK:  # a thread that reads a TIFF redirects it
        tqdm.write(message, file=sys.stderr)
