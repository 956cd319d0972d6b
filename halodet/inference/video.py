"""Inference on videos and cameras: draw the predictions, track objects, and save both."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from halodet.errors import HalodetError
from halodet.inference.demo import ImagePredictor
from halodet.inference.progress import progress_bar
from halodet.inference.result import Result
from halodet.inference.tracking import LOW_SCORE, Tracker
from halodet.inference.video_errors import VideoError
from halodet.inference.video_reader import Frame
from halodet.inference.video_writer import VideoWriter, find_encoder, part_name
from halodet.inference.window import Window, check_display

import numpy as np
from tqdm import tqdm

__all__ = ["DrawnVideo", "FrameSource", "draw_video", "output_path"]

_THREADS = 2  # that draw
_AHEAD = 2  # frames that are decoded before the model needs them


class FrameSource(Protocol):
    """What :func:`draw_video` needs of a :class:`VideoReader` or :class:`Camera`; see there for the attributes."""

    name: str
    stem: str
    path: str | None
    frame_rate: Fraction
    time_base: Fraction
    num_frames: int | None
    is_live: bool

    def __iter__(self) -> Iterator[Frame]:
        """Return the frames."""

    def close(self) -> None:
        """Close the source."""


def output_path(source: FrameSource, output_video: str | None = None, output: str | None = None) -> str | None:
    """Return the name of the drawn video: ``output_video``, or that of the source in the folder ``output``.

    ``output`` may be the name of an .mp4 file too. Without both, it is None, for a window.

    Raises:
        VideoError: the video cannot have this name, av cannot write it, or there is no display for a window.
    """
    if output_video is None and output is None:
        check_display()
        return None
    find_encoder()
    flag = "--output" if output_video is None else "--output-video"
    if output_video is None and output is not None and not output.lower().endswith(".mp4"):
        path = os.path.join(output, f"{source.stem}.mp4")
    else:
        path = output_video or output or ""
        if os.path.isdir(path) or not path.lower().endswith(".mp4"):
            raise VideoError(f"{flag} {path} is invalid: expected a name that ends in .mp4. Fix: rename it.")
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise VideoError(f"{flag} {path} is invalid: its folder does not exist. Fix: create the folder.")
    files = (Path(path), _json_name(path), part_name(path), part_name(_json_name(path)))
    if source.path is not None and os.path.realpath(source.path) in {os.path.realpath(file) for file in files}:
        raise VideoError(f"{flag} {path} is invalid: it would overwrite the input. Fix: use another name.")
    return path


def draw_video(
    predictor: ImagePredictor,
    source: FrameSource,
    output: str | None,
    *,
    threshold: float,
    tracker: Tracker | None = None,
    batch_size: int = 1,
) -> int:
    """Draw the predictions for each frame into an .mp4 file, and save them in a .jsonl file beside it.

    Each line of the .jsonl file is a JSON object with ``frame``, ``time`` in seconds, ``width``, ``height`` and
    ``detections``, COCO annotations with a ``category_name``, and a ``track_id`` where there is a track. While a frame
    is predicted, other threads decode the next ones, and draw and encode those before. Memory does not depend on the
    length.

    Until the end, the files are named ``*.part.mp4`` and ``*.part.jsonl``. An error or Ctrl-C keeps the frames before;
    a process that is killed leaves these files, which are readable.

    Args:
        predictor: a :class:`~halodet.inference.Predictor` or :class:`~halodet.inference.ExportedPredictor`.
        source: the video or camera. It is closed.
        output: name of the .mp4 file; None shows a window, in which q and Esc end the video.
        threshold: minimum score.
        tracker: gives objects track ids; None for none.
        batch_size: number of frames that the model predicts at a time, if the predictor has ``predict_batch``. Those of
            a camera are predicted one by one, without delay.

    Returns:
        Exit code: 0, 1 if the video is damaged or the output cannot be written, 130 after Ctrl-C, or that of another
        expected error.
    """
    code, is_writable = 0, True
    video = DrawnVideo(predictor, source, output, threshold=threshold, tracker=tracker)
    try:
        with progress_bar(source.num_frames, "frames") as bar:
            video.run(batch_size if hasattr(predictor, "predict_batch") and not source.is_live else 1, bar.update)
    except KeyboardInterrupt:
        code = 130
        _print("Stopped")
    except HalodetError as error:
        code = error.exit_code
        _print(str(error))
    except OSError as error:
        code, is_writable = 1, False
        _print(f"{output} cannot be written ({error.strerror or error}). Fix: use another folder.")
    finally:
        try:
            video.close()
        except KeyboardInterrupt:
            code = 130
            _print("Stopped")
        except HalodetError as error:
            code = code or error.exit_code
            _print(str(error))
        except OSError as error:
            code = code or 1
            if is_writable:  # otherwise it was said
                _print(f"{output} cannot be written ({error.strerror or error}). Fix: use another folder.")
    print(f"{video.num_frames} frames drawn, {video.seconds:.2f} s{f': {video.file}' if video.file else ''}")
    return code


class DrawnVideo:
    """Predicts, draws and writes the frames of a source, see :func:`draw_video`.

    Args:
        predictor: the predictor.
        source: the video or camera. :meth:`run` closes it.
        output: name of the .mp4 file; None for a window.
        threshold: minimum score.
        tracker: gives objects track ids; None for none.
        names: names of the classes to draw; None for all.

    Attributes:
        num_frames: number of frames written or shown.
        seconds: time of the last one.
    """

    def __init__(
        self,
        predictor: ImagePredictor,
        source: FrameSource,
        output: str | None,
        *,
        threshold: float,
        tracker: Tracker | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        self._predictor, self._source, self._threshold, self._tracker = predictor, source, threshold, tracker
        self._kept_names = names
        self._names = {entry["id"]: entry["name"] for entry in predictor.classes}
        self._files = None if output is None else _Files(output, source)
        self._window = Window(source.name) if output is None else None
        self._writing: deque[Future[tuple[Frame, np.ndarray]]] = deque()
        self.num_frames, self.seconds = 0, 0.0

    @property
    def file(self) -> Path | None:
        """Name of the video, which has another one until :meth:`close` has finished it; None without frames."""
        return None if self._files is None else self._files.video

    def run(self, batch_size: int, on_frame: Callable[[], Any]) -> None:
        """Process the frames; after an error, those that are being drawn are written before it is raised.

        Args:
            batch_size: number of frames that the model predicts at a time.
            on_frame: called after each frame that was written or shown.
        """
        reading = _ReadAhead(self._source, batch_size + _AHEAD)
        with ThreadPoolExecutor(_THREADS) as drawers, ThreadPoolExecutor(1) as writers:
            try:
                while batch := reading.take(batch_size):
                    for frame, result in self._predict(batch):
                        drawing = drawers.submit(self._draw, frame, result)
                        self._writing.append(writers.submit(self._write, frame, drawing))
                    # A drawing holds the masks of its frame, so few of them wait.
                    while len(self._writing) > batch_size + _THREADS or (self._writing and self._writing[0].done()):
                        if not self._record(on_frame):
                            return
                while self._writing and self._record(on_frame):
                    pass
            finally:
                reading.stop()
                while self._writing:
                    with contextlib.suppress(OSError, HalodetError):  # one error is enough
                        self._record(on_frame)

    def close(self) -> None:
        """Finish the files, or close the window."""
        if self._files is not None:
            self._files.close()
        if self._window is not None:
            self._window.close()

    def _predict(self, batch: Sequence[Frame]) -> list[tuple[Frame, Result]]:
        """Predict frames, and track their objects."""
        images = [frame.image for frame in batch]
        if len(batch) > 1:
            outputs = self._predictor.predict_batch(images)  # type: ignore[attr-defined]
        else:
            outputs = [self._predictor.predict(image) for image in images]
        results = []
        for frame, output in zip(batch, outputs, strict=True):
            result = Result.of(self._predictor, frame.image, output)
            if self._tracker is not None and "instances" in output:
                result = self._tracker.update(result.filter(self._threshold * LOW_SCORE), frame.time)
            results.append((frame, result.filter(self._threshold, self._kept_names)))
        return results

    def _draw(self, frame: Frame, result: Result) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the drawing and the JSON of a frame, in another thread."""
        annotations = result.to_coco(frame.index)
        for annotation in annotations:
            annotation["category_name"] = self._names[annotation["category_id"]]
        height, width = frame.image.shape[:2]
        record = {"frame": frame.index, "time": round(frame.time, 6), "width": width, "height": height}
        return np.asarray(result.draw())[:, :, ::-1], {**record, "detections": annotations}

    def _write(self, frame: Frame, drawing: Future[tuple[np.ndarray, dict[str, Any]]]) -> tuple[Frame, np.ndarray]:
        """Encode a drawing, in the one thread that does, so that the order is kept."""
        image, record = drawing.result()
        image = np.ascontiguousarray(image)
        if self._files is not None:
            self._files.write(image, frame.pts, record)
        return frame, image

    def _record(self, on_frame: Callable[[], Any]) -> bool:
        """Count and show the first frame that is being written, and return whether the user wants more."""
        wait(list(self._writing)[:1])  # Ctrl-C while waiting leaves it in the queue
        frame, image = self._writing.popleft().result()
        self.num_frames, self.seconds = self.num_frames + 1, frame.time
        on_frame()
        return self._window is None or self._window.show(image)


class _ReadAhead:
    """Reads a source in another thread while its frames are used.

    Args:
        source: the source, which that thread closes.
        ahead: maximum number of frames that wait. Of a live source, the latest one waits.
    """

    def __init__(self, source: FrameSource, ahead: int) -> None:
        self._source, self._ahead = source, 1 if source.is_live else ahead
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._stopped = self._ended = False
        self._error: BaseException | None = None
        # A daemon, since a pipe or camera may never answer.
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def take(self, number: int) -> list[Frame]:
        """Return the next frames, less at the end; an error of the source is raised after the frames before it."""
        taken: list[Frame] = []
        with self._changed:
            while len(taken) < number:
                while not self._frames and not self._ended:
                    self._changed.wait(0.2)  # on Windows, Ctrl-C does not end a wait without a limit
                if not self._frames:
                    break
                taken.append(self._frames.popleft())
                self._changed.notify_all()
        if not taken and self._error is not None:
            raise self._error
        return taken

    def stop(self) -> None:
        """Stop reading."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(1)

    def _read(self) -> None:
        try:
            for frame in self._source:
                with self._changed:
                    while len(self._frames) >= self._ahead and not self._source.is_live and not self._stopped:
                        self._changed.wait()
                    if self._stopped:
                        break
                    if len(self._frames) >= self._ahead:
                        self._frames.popleft()
                    self._frames.append(frame)
                    self._changed.notify_all()
        except BaseException as error:  # raised where the frames are used
            self._error = error
        finally:
            self._source.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()


class _Files:
    """The drawn video, and the JSON lines beside it; without frames, neither exists."""

    def __init__(self, path: str, source: FrameSource) -> None:
        self._video = VideoWriter(path, source.frame_rate, source.time_base)
        self._path = _json_name(path)
        self._lines: Any = None
        self._broken = False

    @property
    def video(self) -> Path | None:
        """Name of the video so far; None without frames."""
        return self._video.file

    def write(self, image: np.ndarray, pts: int, record: dict[str, Any]) -> None:
        """Append a frame; after an error, there are no more."""
        if self._broken:
            raise VideoError("A frame before cannot be written.")
        try:
            self._video.write(image, pts)
            if self._lines is None:
                self._lines = open(part_name(self._path), "w", encoding="utf-8")
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        except BaseException:
            self._broken = True
            raise

    def close(self) -> None:
        """Give the files their names."""
        try:
            self._video.close()
        finally:
            if self._lines is not None:
                try:
                    self._lines.close()
                finally:
                    os.replace(part_name(self._path), self._path)


def _json_name(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_suffix(".jsonl")


def _print(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
