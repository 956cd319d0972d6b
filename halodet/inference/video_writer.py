"""H.264 videos in MP4 files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from halodet.inference.video_errors import VideoError, import_av

import cv2
import numpy as np

__all__ = ["VideoWriter", "find_encoder", "part_name"]

_ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "h264_mf")
_OPTIONS = {"libx264": {"preset": "veryfast", "crf": "21"}}
_BIT_RATE = 4_000_000  # of the other encoders, which have no constant quality
_KEY_FRAME_SECONDS = 2  # also the most that is lost of a video whose writer is killed
_MAX_GAP = 2**31 - 1  # units of the time base
_BT709 = 1  # FFmpeg's number of the color space, primaries and transfer
_LIMITED = 1  # FFmpeg's number of the color range


def find_encoder() -> str:
    """Return FFmpeg's name of an H.264 encoder.

    Raises:
        VideoError: av is not installed or has none.
    """
    available = import_av().codecs_available
    for name in _ENCODERS:
        if name in available:
            return name
    raise VideoError(
        "The installed av has no H.264 encoder. Fix: pip install --force-reinstall av (the wheels on PyPI have one)."
    )


def part_name(path: str | os.PathLike[str]) -> Path:
    """Return the name of a file while it is written: ``a.part.mp4`` for ``a.mp4``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.part{path.suffix}")


class VideoWriter:
    """Writes frames as a video that browsers play: H.264, 4:2:0, MP4 with the index in front.

    The file exists under its name once :meth:`close` returns; until then it has that of :func:`part_name`. Without
    frames, there is no file. Use the writer in a ``with`` statement.

    Args:
        path: name of the file, which must end in .mp4.
        frame_rate: average frames per second, a hint for the encoder.
        time_base: unit of the time stamps in seconds.

    Attributes:
        path: name of the file.
        file: the file as it is named so far; None before the first frame.

    Raises:
        VideoError: av is not installed or has no H.264 encoder, or the name has another suffix.
    """

    def __init__(self, path: str | os.PathLike[str], frame_rate: Fraction, time_base: Fraction) -> None:
        self._av, self.path = import_av(), Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise VideoError(f"{self.path} is invalid: expected a name that ends in .mp4.")
        self._encoder = find_encoder()
        self._frame_rate, self._time_base = frame_rate, time_base
        self.file: Path | None = None
        self._container: Any = None
        self._last = 0

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, image: np.ndarray, pts: int) -> None:
        """Append a frame.

        Args:
            image: (H, W, 3) uint8 BGR image; all frames have the size of the first one. The last row or column is
                repeated if the size is odd.
            pts: time of the frame in units of the time base, above that of the frame before.

        Raises:
            OSError: the file cannot be written.
            VideoError: the encoder does not take frames of this size, or MP4 no time without frames of this length.
        """
        if self._container is not None and pts - self._last > _MAX_GAP:
            hours = float((pts - self._last) * self._time_base / 3600)
            raise VideoError(f"{self.path} cannot have {hours:.1f} hours without a frame. Fix: split the video there.")
        self._last = pts
        height, width = image.shape[:2]
        # 4:2:0 needs even sizes. A border, unlike scaling, leaves the pixels where the detections say.
        if height % 2 or width % 2:
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        with self._explained_errors():
            if self._container is None:
                self._open(image.shape[1], image.shape[0])
            frame = self._av.VideoFrame.from_ndarray(image, format="bgr24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = pts, self._time_base
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the video.

        Raises:
            OSError: the file cannot be written.
        """
        if self._container is None:
            return
        container, self._container = self._container, None
        part = part_name(self.path)
        final = part.with_suffix(".index.mp4")
        with self._explained_errors():
            try:
                container.mux(self._stream.encode(None))
            finally:
                container.close()
            try:
                self._copy(part, final)
                os.replace(final, self.path)
                self.file = self.path
            finally:
                final.unlink(missing_ok=True)
            part.unlink()

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Convert FFmpeg's errors that are no OSError."""
        try:
            yield
        except self._av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise VideoError(f"{self.path} cannot be written ({error.strerror}). Fix: use another size.") from error

    def _open(self, width: int, height: int) -> None:
        # Fragments make the file playable up to the last key frame if the process is killed. The index in front
        # (faststart), by which browsers start and seek at once, can only be written at the end: close() copies the
        # packets into such a file, which takes a small part of the time of encoding.
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        container = self._av.open(os.fspath(part_name(self.path)), "w", format="mp4", options=options)
        try:
            stream = container.add_stream(self._encoder, rate=self._frame_rate, options=_OPTIONS.get(self._encoder, {}))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.time_base = stream.time_base = self._time_base
            context.gop_size = max(round(self._frame_rate * _KEY_FRAME_SECONDS), 1)
            context.max_b_frames = 0  # so that every player shows the first frame at time 0, without an edit list
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
            if self._encoder not in _OPTIONS:
                context.bit_rate = _BIT_RATE
        except BaseException:
            container.close()
            raise
        self._container, self._stream, self.file = container, stream, part_name(self.path)

    def _copy(self, source: Path, target: Path) -> None:
        """Copy the packets of a video into a file with the index in front."""
        av = self._av
        with (
            av.open(os.fspath(source)) as reader,
            av.open(os.fspath(target), "w", format="mp4", options={"movflags": "faststart"}) as writer,
        ):
            stream = writer.add_stream_from_template(reader.streams.video[0])
            for packet in reader.demux(video=0):
                if packet.dts is not None:
                    if not packet.duration:  # that of the last frame counts: with none, the frame is not shown
                        packet.duration = max(round(1 / (self._frame_rate * packet.time_base)), 1)
                    packet.stream = stream
                    writer.mux(packet)
