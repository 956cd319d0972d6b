"""Frames of video files, pipes and streams."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from halodet.inference.video_errors import VideoEndedEarly, VideoError, import_av

import numpy as np

__all__ = ["STDIN", "Frame", "VideoReader"]

STDIN = "-"
_NO_VIDEO = ("tty",)  # FFmpeg draws text files as videos
_WITH_DURATION = ("mov", "matroska", "avi")  # formats whose header has the duration of the whole video
_MAX_RATE = 1000  # higher ones are a time base that was taken for a rate
_TOLERANCE = 0.5  # seconds that a video may end before that
# Demuxers that read one file. Others, such as those of playlists, open the files and addresses that the file names.
_UPLOAD_FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg")
_UPLOAD_NAMES = "an MP4, MOV, Matroska, WebM, AVI, MPEG, FLV, ASF or Ogg video"
_UPLOAD_OPTIONS = {"format_whitelist": ",".join(_UPLOAD_FORMATS), "protocol_whitelist": "none"}
_FIX = "Fix: convert the video with ffmpeg, or use another one."


@dataclass
class Frame:
    """One frame of a video.

    Attributes:
        index: number of the frame, from 0.
        time: seconds since the first frame.
        pts: the same in units of ``time_base`` of the video.
        image: (H, W, 3) uint8 BGR image.
    """

    index: int
    time: float
    pts: int
    image: np.ndarray


class VideoReader:
    """Reads the frames of a video once, in order; memory does not depend on its length.

    Frames are upright and have square pixels. All have the size of the first one. Time stamps are those of the file;
    frames without one have the distance of the frame rate.

    Args:
        source: name of a file, URL of a stream, or ``"-"`` for stdin.
        upload_name: name in messages of a file that somebody else wrote. Such a file must have one of the common
            formats of videos, and FFmpeg opens no other file and no address for it. None for a source that is trusted.
        max_pixels: maximum number of pixels of a frame; None for no limit.

    Attributes:
        name: name of the source in messages.
        stem: name of the source without folder and suffix.
        path: path of the file; None for a stream.
        frame_rate: average number of frames per second.
        time_base: unit of the time stamps in seconds.
        num_frames: estimated number of frames; None where it is unknown.
        duration: length by the header in seconds; None where it is unknown.
        is_live: whether frames that come faster than they are used are to be skipped.

    Raises:
        VideoError: the source cannot be read, or has no video.
    """

    is_live = False

    def __init__(
        self, source: str | os.PathLike[str], *, upload_name: str | None = None, max_pixels: int | None = None
    ) -> None:
        av = import_av()
        source, is_upload = os.fspath(source), upload_name is not None
        if source.startswith("file:") and not is_upload:
            source = url2pathname(urlsplit(source).path)
        is_url = "://" in source and not is_upload
        self.name = upload_name or ("stdin" if source == STDIN else source)
        self.stem = Path(self.name).stem
        self.path = None if source == STDIN or is_url else source
        # Unbuffered, so that a thread that waits for stdin holds no lock. An absolute path is never taken for a URL.
        opened: Any = source if is_url or not source else os.path.abspath(source)
        self._file: Any = None
        try:
            if source == STDIN:
                opened = open(0, "rb", buffering=0, closefd=False)
            if is_upload:  # a file that Python opened needs no protocol of FFmpeg, so all of them can be forbidden
                opened = self._file = open(os.path.abspath(source), "rb")
            options = {} if max_pixels is None else {"max_pixels": str(max_pixels)}
            self._container = av.open(opened, options={**options, **(_UPLOAD_OPTIONS if is_upload else {})})
        except (av.FFmpegError, OSError, ValueError) as error:
            self._close_file()
            if isinstance(error, OSError) and not is_upload:
                expected, fix = f"a readable video ({_reason(error)})", "Fix: correct the name."
            else:
                reason = "it is empty" if _is_empty(self.path) else _reason(error)
                expected, fix = f"{_UPLOAD_NAMES if is_upload else 'a video'} ({reason})", _FIX
            raise VideoError(f"{self.name} is invalid: expected {expected}. {fix}") from error
        try:
            self._stream = self._find_stream(av)
            self._size = self._square_size()
            width, height = self._size
            if max_pixels is not None and width * height > max_pixels:
                raise VideoError(
                    f"{self.name} is invalid: its frames have {width} x {height} pixels, expected at most "
                    f"{max_pixels:,} pixels. Fix: make the video smaller."
                )
        except VideoError:
            self.close()
            raise
        if max_pixels is not None:
            self._stream.codec_context.options = {"max_pixels": str(max_pixels)}  # the size may change later
        self._stream.thread_type = "AUTO"
        self.time_base: Fraction = self._stream.time_base
        rate = self._stream.average_rate or self._stream.guessed_rate or 0
        self.frame_rate = Fraction(rate) if 0 < rate <= _MAX_RATE else Fraction(30)
        self._cut = False
        self._error: str | None = None
        self._position = self._damaged_after = "the start"
        self._end = self._stated_end()
        seconds = self._end or (self._container.duration or 0) / 1e6
        own = float(self._stream.duration * self.time_base) if self._stream.duration else 0.0
        self.duration: float | None = own or (self._container.duration or 0) / 1e6 or None
        self.num_frames: int | None = self._stream.frames or round(seconds * self.frame_rate) or None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()
        self._close_file()

    def __iter__(self) -> Iterator[Frame]:
        """Return the frames.

        Raises:
            VideoEndedEarly: after the last frame, if the video is damaged or cut off.
        """
        distance = max(round(1 / (self.frame_rate * self.time_base)), 1)
        clock, index, end = _Clock(distance, round(1 / self.time_base)), 0, 0
        for frame in self._decode():
            pts = clock.next(frame.pts)
            time = float(pts * self.time_base)
            end = (end if frame.pts is None else frame.pts) + (frame.duration or distance)
            yield Frame(index, time, pts, self._image(frame))
            index += 1
            self._position = f"frame {index - 1} at {time:.2f} s"
        if not index:
            raise VideoError(
                f"{self.name} is invalid: no frame can be decoded ({self._error or 'it is empty'}). {_FIX}"
            )
        missing = 0.0 if self._end is None else self._end - float(end * self.time_base)
        if self._cut or missing > _TOLERANCE:
            reason = f" ({self._error})" if self._error else ""
            rest = f"; {missing:.2f} s are missing" if missing > _TOLERANCE else ""
            raise VideoEndedEarly(f"{self.name} is cut off{reason}: it ends after {self._position}{rest}.")
        if self._error is not None:
            raise VideoEndedEarly(f"{self.name} is damaged ({self._error}), first after {self._damaged_after}.")

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def _square_size(self) -> tuple[int, int]:
        """Return the width and height of the frames with square pixels; enlarging loses nothing."""
        context = self._stream.codec_context
        aspect = Fraction(self._stream.sample_aspect_ratio or context.sample_aspect_ratio or 1)
        return round(context.width * max(aspect, 1)), round(context.height * max(1 / aspect, 1))

    def _find_stream(self, av: Any) -> Any:
        """Return the first video stream; a cover picture is none."""
        container = self._container
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams or container.format.name in _NO_VIDEO:
            raise VideoError(f"{self.name} is invalid: it has no video stream. Fix: use a file with a video.")
        if streams[0].codec_context is None:
            raise VideoError(f"{self.name} is invalid: PyAV has no decoder for its codec. {_FIX}")
        if not streams[0].codec_context.width or streams[0].time_base is None:
            raise VideoError(f"{self.name} is invalid: the size of its frames is unknown. {_FIX}")
        return streams[0]

    def _stated_end(self) -> float | None:
        """Return the time at which the video ends by its header, in seconds."""
        stream = self._stream
        if not any(name in self._container.format.name for name in _WITH_DURATION):
            return None
        if stream.duration:
            return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        try:  # of Matroska
            hours, minutes, seconds = (float(part) for part in stream.metadata.get("DURATION", "").split(":"))
        except ValueError:
            return None
        return hours * 3600 + minutes * 60 + seconds

    def _decode(self) -> Iterator[Any]:
        """Decode the packets; those that are damaged are skipped."""
        av = import_av()
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.FFmpegError, OSError) as error:
                self._cut, self._error = True, _reason(error)
                return
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                if self._error is None:
                    self._error, self._damaged_after = _reason(error), self._position

    def _image(self, frame: Any) -> np.ndarray:
        width, height = self._size
        image = frame.reformat(width=width, height=height, format="bgr24").to_ndarray()
        return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


class _Clock:
    """Converts the time stamps of a stream to increasing ones that start at 0.

    Args:
        distance: normal distance of two frames, in units of the time base.
        second: one second, likewise.
    """

    def __init__(self, distance: int, second: int) -> None:
        self._distance, self._second = distance, second
        self._first, self._offset, self._last = 0, 0, -1

    def next(self, stamp: int | None) -> int:
        """Return the time stamp of the next frame, whose own is ``stamp``, if it has one."""
        following = self._last + self._distance
        if self._last < 0:
            self._first, following = stamp or 0, 0
            self._offset = self._first
        time = following if stamp is None else stamp - self._offset
        # Where recordings were joined, time starts again; in short ones it falls less, but to the start.
        fall = self._last - time
        if stamp is not None and (fall > self._second or (stamp <= self._first and fall > 2 * self._distance)):
            self._offset, time = stamp - following, following
        self._last = max(time, self._last + 1)
        return self._last


def _is_empty(path: str | None) -> bool:
    return path is not None and os.path.isfile(path) and os.path.getsize(path) == 0


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
