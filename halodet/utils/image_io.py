"""Read an image file into the array that Detectron2's predictor takes."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

from halodet.errors import ImageError

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ["STDERR_LOCK", "UPLOAD_FORMATS", "apply_exif_orientation", "decode_image", "read_image", "to_bgr"]

STDERR_LOCK = threading.RLock()  # held while file descriptor 2 is redirected: hold it to print from another thread
# Formats of Pillow whose decoders start no other program, as that of EPS does.
UPLOAD_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_WHITE = 255
_ORIENTATION = 274  # EXIF tag
_UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read any image that Pillow opens as an upright (H, W, 3) uint8 array in BGR order.

    EXIF orientation is applied (broken EXIF is ignored), transparency is composited on white, and the first frame of an
    animation or multi-page file is read. 16-bit values are scaled by 1/257. 32-bit values (Pillow's modes I and F) have
    no range of their own: they are scaled from the smallest of 0..1 (F only), 0..255 and 0..65535 that contains them
    all, else from their own minimum..maximum.

    Raises:
        ImageError: the file is missing, empty, truncated, not an image, without pixels, or larger than Pillow's limit
            against decompression bombs (twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million pixels).
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ImageError(f"{path} is a folder, expected an image file.")
    if not os.path.exists(path):
        raise ImageError(f"{path} does not exist.")
    if not os.path.isfile(path):
        raise ImageError(f"{path} is not a regular file.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"{path} is an empty file (0 bytes).")
    return _read(path, path)


def decode_image(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """Decode an image from an untrusted source to the array that :func:`read_image` returns for such a file.

    Only the formats in :data:`UPLOAD_FORMATS` are read. The size is checked before any pixel is decoded.

    Args:
        data: content of the file.
        name: name of the image in errors.
        max_pixels: maximum number of pixels.

    Raises:
        ImageError: see :func:`read_image`; or the image is larger than ``max_pixels``.
    """
    if not data:
        raise ImageError(f"{name} is an empty file (0 bytes).")
    return _read(io.BytesIO(data), name, UPLOAD_FORMATS, max_pixels)


def _read(
    source: str | BinaryIO, name: str, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> np.ndarray:
    if formats is not None:
        Image.init()
        formats = tuple(kind for kind in formats if kind in Image.OPEN)  # a build of Pillow may lack some
    try:
        # Pillow warns about every unusual tag, and about images above half its limit, which are accepted here.
        with _IGNORE_WARNINGS:
            with Image.open(source, formats=formats) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise ImageError(
                        f"{image.width} x {image.height} pixels are too many: expected at most {max_pixels:,}. "
                        "Fix: reduce the image."
                    )
                # A TIFF is rotated while it loads, so its orientation tag must be read afterwards.
                with _silence_libtiff(image.format):
                    image.load()
                return to_bgr(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image that Pillow can read (broken header or unsupported format)."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {_one_line(error)}. Fix: reduce the image.") from error
    except Exception as error:  # decoders raise nearly anything on a malformed file: OSError, SyntaxError, KeyError ...
        raise ImageError(
            f"{name} cannot be decoded ({getattr(error, 'strerror', None) or _one_line(error)})."
        ) from error


@contextlib.contextmanager
def _silence_libtiff(image_format: str | None) -> Iterator[None]:
    """Discard what libtiff writes to file descriptor 2 for each unusual tag of a TIFF."""
    if image_format != "TIFF":
        yield
        return
    with STDERR_LOCK:
        stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(null)
            os.close(stderr)


class _IgnoreWarnings:
    """Ignore warnings while any thread is inside; the filters are global, and nesting across threads mixes them up."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._saved = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.close()


_IGNORE_WARNINGS = _IgnoreWarnings()


def to_bgr(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of any mode to an (H, W, 3) uint8 BGR array, upright.

    Raises:
        ImageError: the image has no pixels, or pixels that are no numbers.
    """
    if 0 in image.size:
        raise ImageError(f"the image has no pixels ({image.width} x {image.height}).")
    image_format = image.format
    image = apply_exif_orientation(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_to_8_bit(image, image_format)[:, :, None], 3, axis=2)
    if image.mode == "La":  # Pillow has no conversion from premultiplied grey to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (_WHITE,) * 4), image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Return the image upright; broken EXIF is ignored.

    Source: Detectron2's ``_apply_exif_orientation``, so that images are rotated as in its training.
    """
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    except Exception:  # a broken header may raise anything
        return image
    return image if method is None else image.transpose(method)


def _to_8_bit(image: Image.Image, image_format: str | None) -> np.ndarray:
    """Scale a 16- or 32-bit grey image to (H, W) uint8."""
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        raise ImageError(f"{int((~finite).sum())} of {values.size} pixels are NaN or infinite.")
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):  # 16 bits at most
        low, high = 0.0, 65535.0
    else:
        ranges = [(0.0, 1.0)] * (image.mode == "F") + [(0.0, 255.0), (0.0, 65535.0)]
        low, high = next((r for r in ranges if low >= r[0] and high <= r[1]), (low, high))
    grey = np.rint((values - low) / (high - low) * 255.0) if high > low else np.zeros_like(values)
    grey = grey.astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = _WHITE
    return grey


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
