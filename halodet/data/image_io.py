"""Read an image file into the array that Detectron2's predictor takes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

from halodet.errors import ImageError

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from PIL import Image, UnidentifiedImageError

_WHITE = 255


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
    try:
        # Pillow warns about every unusual tag, and about images above half its limit, which are accepted here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # A TIFF is rotated while it loads, so its orientation tag must be read afterwards.
                with _silence_libtiff(image.format):
                    image.load()
                return to_bgr(image)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is not an image that Pillow can read (broken header or unsupported format)."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {_one_line(error)}.") from error
    except Exception as error:  # decoders raise nearly anything on a malformed file: OSError, SyntaxError, KeyError ...
        raise ImageError(
            f"{path} cannot be decoded ({getattr(error, 'strerror', None) or _one_line(error)})."
        ) from error


@contextlib.contextmanager
def _silence_libtiff(image_format: str | None) -> Iterator[None]:
    """Discard what libtiff writes to file descriptor 2 for each unusual tag of a TIFF."""
    if image_format != "TIFF":
        yield
        return
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(null)
        os.close(stderr)


def to_bgr(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of any mode to an (H, W, 3) uint8 BGR array, upright.

    Raises:
        ImageError: the image has no pixels, or pixels that are no numbers.
    """
    if 0 in image.size:
        raise ImageError(f"the image has no pixels ({image.width} x {image.height}).")
    image_format = image.format
    image = _apply_exif_orientation(image)  # Detectron2's own, so that images are rotated as in its training
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_to_8_bit(image, image_format)[:, :, None], 3, axis=2)
    if image.mode == "La":  # Pillow has no conversion from premultiplied grey to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (_WHITE,) * 4), image)
    return np.ascontiguousarray(convert_PIL_to_numpy(image, "BGR"))


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
