"""Detection in uploaded videos, in a thread of its own."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from halodet.errors import HalodetError
from halodet.inference.tracking import Tracker
from halodet.inference.video import DrawnVideo
from halodet.inference.video_errors import VideoEndedEarly, VideoError
from halodet.inference.video_reader import Frame, VideoReader
from halodet.serving.detector import Detector
from halodet.serving.short_name import short_name

import numpy as np

__all__ = ["LimitedVideo", "VideoJob", "stop_jobs"]

_MAX_RATE = 120  # frames per second, on average over the longest video
_TOLERANCE = 0.5  # seconds by which the duration may exceed the limit
_STOP_SECONDS = 20
_STOPPED = "The video was stopped."
_running: set[VideoJob] = set()

logger = logging.getLogger(__name__)


class LimitedVideo:
    """Frames of an uploaded video up to a time, with the attributes of :class:`VideoReader`.

    Args:
        path: the file.
        name: name of the file in messages.
        max_seconds: maximum duration.
        max_pixels: maximum number of pixels of a frame.

    Raises:
        VideoError: the file is no video, or its header says that it is too long or its frames are too large.
    """

    is_live = False

    def __init__(self, path: str | os.PathLike[str], name: str, max_seconds: float, max_pixels: int) -> None:
        self._reader = VideoReader(path, upload_name=name, max_pixels=max_pixels)
        self._seconds, self._frames = max_seconds, max(int(max_seconds * _MAX_RATE), 1)
        duration, frames = self._reader.duration, self._reader.num_frames
        if duration is not None and duration > max_seconds + _TOLERANCE:
            self.close()
            raise VideoError(
                f"{name} is invalid: it lasts {duration:.1f} s, expected at most {max_seconds:g} s. "
                "Fix: upload a shorter video."
            )
        self.name, self.stem, self.path = name, Path(name).stem, self._reader.path
        self.frame_rate, self.time_base = self._reader.frame_rate, self._reader.time_base
        self.num_frames = None if frames is None else min(frames, self._frames)
        self.is_stopped = threading.Event()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __iter__(self) -> Iterator[Frame]:
        """Return the frames.

        Raises:
            VideoEndedEarly: after the last frame, if the video is damaged, cut off or longer than the limits, or
                ``is_stopped`` is set.
        """
        for frame in self._reader:
            if self.is_stopped.is_set():
                raise VideoEndedEarly(_STOPPED)
            if frame.time >= self._seconds + _TOLERANCE:
                raise VideoEndedEarly(f"{self.name} is longer than {self._seconds:g} s: the rest was skipped.")
            if frame.index >= self._frames:
                raise VideoEndedEarly(f"{self.name} has more than {self._frames} frames: the rest was skipped.")
            yield frame


class VideoJob:
    """Draws the detections of a video in another thread, into a folder that exists until :meth:`release`.

    Args:
        detector: the detector, which other threads use between two frames.
        source: the video. The job closes it.
        folder: folder in which the folder of the job is created.
        threshold: minimum score.
        names: names of the classes to draw; None for all.
        tracker: gives objects track ids; None for none.

    Attributes:
        video: name of the drawn video.
        lines: name of the file of its JSON lines.
        num_frames: number of frames that are done.
        total: estimated number of frames; None where it is unknown.
        error: why the video ended early; None if it did not.
    """

    def __init__(
        self,
        detector: Detector,
        source: LimitedVideo,
        folder: Path,
        *,
        threshold: float,
        names: Collection[str] | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self._detector, self._source = detector, source
        self.classes, self.stuff_classes, self.panoptic = detector.classes, detector.stuff_classes, detector.panoptic
        self._folder = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
        self.video = Path(self._folder.name) / f"{short_name(source.stem)}.mp4"
        self.lines = self.video.with_suffix(".jsonl")
        self.num_frames, self.total = 0, source.num_frames
        self.error: str | None = None
        self._start = time.monotonic()
        self._is_done, self._is_released = threading.Event(), threading.Event()
        drawn = DrawnVideo(self, source, str(self.video), threshold=threshold, names=names, tracker=tracker)
        self._thread = threading.Thread(target=self._work, args=[drawn], daemon=True)
        _running.add(self)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the end, and return whether it has come."""
        return self._is_done.wait(seconds)

    def seconds_left(self) -> float | None:
        """Return the estimated time that the rest takes; None while it is unknown."""
        if not self.num_frames or self.total is None:
            return None
        return (time.monotonic() - self._start) / self.num_frames * max(self.total - self.num_frames, 0)

    def stop(self) -> None:
        """Stop after the current frame; the files have the frames before."""
        self._source.is_stopped.set()

    def release(self) -> None:
        """Stop after the current frame, and delete the folder, in the thread of the job."""
        self.stop()
        self._is_released.set()

    def join(self, seconds: float) -> None:
        """Wait until the folder is deleted."""
        self._thread.join(seconds)

    def predict(self, image: np.ndarray, /) -> dict[str, Any]:
        """Predict a frame for :class:`DrawnVideo`."""
        if self._source.is_stopped.is_set():
            raise VideoEndedEarly(_STOPPED)
        return self._detector.predict_frame(image)

    def _work(self, drawn: DrawnVideo) -> None:
        try:
            self._draw(drawn)
        finally:
            self._is_done.set()
            self._is_released.wait()
            self._folder.cleanup()
            _running.discard(self)

    def _draw(self, drawn: DrawnVideo) -> None:
        try:
            try:
                drawn.run(1, self._count)
            finally:
                drawn.close()
        except HalodetError as error:
            self.error = str(error).replace(str(self.video), "The drawn video")
        except OSError as error:
            logger.error("A drawn video cannot be written (%s)", error.strerror or error)
            self.error = "The drawn video cannot be written. Fix: see the log of the server."
        except Exception as error:  # a decoder or an encoder that fails must not be silent
            logger.exception("A video failed")
            self.error = f"The video failed ({type(error).__name__}). Fix: see the log of the server."

    def _count(self) -> None:
        self.num_frames += 1


def stop_jobs() -> None:
    """Stop all jobs, and wait until their folders are deleted."""
    jobs = list(_running)
    for job in jobs:
        job.release()
    for job in jobs:
        job.join(_STOP_SECONDS)
