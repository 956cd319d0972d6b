"""Reading a picture from a file into the array that Detectron2's predictor takes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

from halodet.errors import ImageError

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from PIL import Image, UnidentifiedImageError

__all__ = ["ImageError", "read_image"]

_WHITE = 255


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read any picture that Pillow opens as an upright (H, W, 3) uint8 array in BGR order.

    EXIF orientation is applied (broken EXIF is ignored), transparency is laid on white, and of an animation or a multi-page file
    the first frame is taken. 16-bit values are scaled by 1/257. 32-bit values (Pillow's modes I and F) carry no range of their own:
    they are scaled from the smallest of 0..1 (F only), 0..255 and 0..65535 that holds them all, else from their own minimum..maximum.

    Raises:
        ImageError: the file is missing, empty, truncated, no image, without pixels, or larger than Pillow's limit against
            decompression bombs (twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million pixels).
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ImageError(f"{path} is a folder, not an image.")
    if not os.path.exists(path):
        raise ImageError(f"{path} does not exist.")
    if not os.path.isfile(path):
        raise ImageError(f"{path} is not a regular file.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"{path} is an empty file (0 bytes).")
    try:
        # Pillow warns of every odd tag, and once of images above half its limit, which are let through here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # Loading comes first: a TIFF turns itself upright while it loads, so its tag must be asked for afterwards.
                with _quiet_libtiff(image.format):
                    image.load()
                return _to_bgr(image)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is not an image that Pillow can read (no image, a broken header or an unsupported format)."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {_sentence(error)}") from error
    except Exception as error:  # on a malformed file Pillow's decoders raise nearly anything: OSError, SyntaxError, TypeError, KeyError ...
        reason = getattr(error, "strerror", None) or _sentence(error).rstrip(".")
        raise ImageError(f"{path} cannot be read as an image ({reason}).") from error


@contextlib.contextmanager
def _quiet_libtiff(kind: str | None) -> Iterator[None]:
    """Keep libtiff, which writes straight to file descriptor 2, from printing a line for each odd tag of a broken TIFF."""
    if kind != "TIFF":
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


def _to_bgr(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ImageError(f"the image has no pixels ({image.width} x {image.height}).")
    kind = image.format
    # Detectron2's own helper, so that a picture is turned here exactly as it was for training.
    image = _apply_exif_orientation(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _grey_to_8_bit(image, kind)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "La":  # premultiplied grey has no direct way to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (_WHITE,) * 4), image)
    return np.ascontiguousarray(convert_PIL_to_numpy(image, "BGR"))


def _grey_to_8_bit(image: Image.Image, kind: str | None) -> np.ndarray:
    """Scale a 16- or 32-bit grey image to (H, W) uint8; ``kind`` is Pillow's name of the file format."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise ImageError(f"{count} of {values.size} pixels are NaN or infinite; replace them and save the image again.")
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (
        image.mode == "I" and kind in ("PNG", "PPM")
    ):  # these two hold 16 bits at most
        bounds = (0.0, 65535.0)
    else:
        ranges = [(0.0, 1.0)] * (image.mode == "F") + [(0.0, 255.0), (0.0, 65535.0)]
        bounds = next((r for r in ranges if low >= r[0] and high <= r[1]), (low, high))
    grey = (
        np.rint((values - bounds[0]) / (bounds[1] - bounds[0]) * 255.0)
        if bounds[1] > bounds[0]
        else np.zeros_like(values)
    )
    grey = grey.astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = _WHITE
    return grey


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else text + "."
