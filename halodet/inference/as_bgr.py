"""Conversion of images of any kind to BGR arrays."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from halodet.errors import HalodetError
from halodet.utils.image_io import read_image, to_bgr

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImageLike", "PredictorError", "as_bgr"]

ImageLike: TypeAlias = Union[np.ndarray, "Tensor", Image.Image, str, os.PathLike[str]]


class PredictorError(HalodetError, TypeError):
    """An image has a shape or type that the predictor does not take."""


def as_bgr(image: ImageLike) -> np.ndarray:
    """Return an image as an (H, W, 3) uint8 BGR array.

    Args:
        image: a file name; a Pillow image; a uint8 array (H, W), (H, W, 1), (H, W, 3) BGR or (H, W, 4) BGRA, as OpenCV
            has them; or a uint8 tensor (1 or 3, H, W) RGB, as torchvision has them. Transparent pixels become white.

    Raises:
        PredictorError: another shape or type; names both.
        ImageError: the file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_bgr(image)
    array: Any = image
    torch = sys.modules.get("torch")  # without it, no image is a tensor
    if torch is not None and isinstance(image, torch.Tensor):
        fits = image.ndim == 3 and len(image) in (1, 3)
        array = np.ascontiguousarray(image.detach().cpu().numpy()[::-1].transpose(1, 2, 0)) if fits else None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise _unexpected(image)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.shape[2] == 4:
        alpha = array[:, :, 3:].astype(np.float32) / 255
        return np.rint(array[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    if array.shape[2] not in (1, 3):
        raise _unexpected(image)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _unexpected(image: Any) -> PredictorError:
    kind = type(image).__name__
    found = f"{kind} of shape {tuple(image.shape)} and type {image.dtype}" if hasattr(image, "shape") else kind
    return PredictorError(
        f"Image is a {found}: expected uint8, an array (H, W), (H, W, 1), (H, W, 3) BGR or (H, W, 4) BGRA, a tensor "
        "(3, H, W) RGB, a Pillow image or a file name."
    )
