"""Frames of a camera."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from halodet.inference.video_errors import VideoEndedEarly, VideoError
from halodet.inference.video_reader import Frame

import cv2

__all__ = ["Camera"]

_TIME_BASE = Fraction(1, 90000)
_MAX_NUMBER = 2**31 - 1
_SILENT = 0  # OpenCV's level of logging


class Camera:
    """Reads frames of a camera until it is closed, with the attributes of :class:`VideoReader`.

    Time stamps are the times of reading. ``frame_rate`` is that which the camera states, or 30.

    Args:
        number: number of the camera, from 0.

    Raises:
        VideoError: there is no such camera.
    """

    path = None
    num_frames = None
    is_live = True
    time_base = _TIME_BASE

    def __init__(self, number: int) -> None:
        self.name, self.stem = f"camera {number}", f"webcam{number}"
        if not 0 <= number <= _MAX_NUMBER:  # on others OpenCV crashes
            raise VideoError(f"--webcam {number} is invalid: expected a number from 0.")
        logging: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 5 has moved these functions
        level = logging.getLogLevel()
        logging.setLogLevel(_SILENT)  # each of OpenCV's interfaces prints why it has no such camera
        try:
            self._capture = cv2.VideoCapture(number)
        finally:
            logging.setLogLevel(level)
        if not self._capture.isOpened():
            self._capture.release()
            raise VideoError(
                f"--webcam {number} is invalid: there is no such camera, or another program uses it. "
                "Fix: use another number, or close the other program."
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.frame_rate = Fraction(rate).limit_denominator(1001) if 1 <= rate <= 1000 else Fraction(30)

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the camera."""
        self._capture.release()

    def __iter__(self) -> Iterator[Frame]:
        """Return the frames.

        Raises:
            VideoEndedEarly: the camera no longer has frames.
        """
        index, start, last = 0, time.monotonic(), -1
        while True:
            has_frame, image = self._capture.read()
            if not has_frame:
                raise VideoEndedEarly(f"{self.name} has no more frames after {time.monotonic() - start:.2f} s.")
            start = start if index else time.monotonic()
            last = max(round((time.monotonic() - start) / _TIME_BASE), last + 1)
            yield Frame(index, float(last * _TIME_BASE), last, image)
            index += 1
