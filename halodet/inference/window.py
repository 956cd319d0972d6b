"""Window that shows a video."""

from __future__ import annotations

import os
import sys

from halodet.inference.video_errors import VideoError

import cv2
import numpy as np

__all__ = ["Window", "check_display"]

_QUIT = (ord("q"), 27)  # 27 is Esc
_MAX_SIZE = (1280, 720)  # of the window at the start, width and height


def check_display() -> None:
    """Check that a window can be shown.

    Raises:
        VideoError: OpenCV is built without windows, or there is no display.
    """
    # Without a display, Qt ends the process instead of raising an error.
    has_display = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not has_display or not cv2.currentUIFramework():
        raise VideoError("There is no display for a window. Fix: add --output DIR or --output-video FILE.mp4.")


class Window:
    """OpenCV's window; use it from the main thread.

    Args:
        title: title of the window.
    """

    def __init__(self, title: str) -> None:
        self._title, self._has_size = title, False
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)

    def show(self, image: np.ndarray) -> bool:
        """Show a BGR image, and return whether the user wants more: False after q, Esc and closing the window."""
        if not self._has_size:
            scale = min(1.0, _MAX_SIZE[0] / image.shape[1], _MAX_SIZE[1] / image.shape[0])
            cv2.resizeWindow(self._title, round(image.shape[1] * scale), round(image.shape[0] * scale))
            self._has_size = True
        cv2.imshow(self._title, image)
        key = cv2.waitKey(1) & 0xFF
        return key not in _QUIT and cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1

    def close(self) -> None:
        """Close the window."""
        cv2.destroyWindow(self._title)
