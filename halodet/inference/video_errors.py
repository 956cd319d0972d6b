"""Errors of videos, and the import of PyAV."""

from __future__ import annotations

from typing import Any

from halodet.errors import HalodetError

__all__ = ["VideoEndedEarly", "VideoError", "import_av"]


class VideoError(HalodetError, ValueError):
    """A video or camera cannot be read, or a video cannot be written."""


class VideoEndedEarly(VideoError):
    """A video is damaged or cut off; the frames before are complete."""

    exit_code = 1


def import_av() -> Any:
    """Return the package av (PyAV), which holds FFmpeg's libraries.

    Raises:
        VideoError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise VideoError(f"Videos need the package av ({error}). Fix: pip install 'halodet[video]'.") from error
    return av
