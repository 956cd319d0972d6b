"""Calls of a predictor with one image or many."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from halodet.inference.as_bgr import ImageLike, PredictorError, as_bgr
from halodet.inference.result import Result

import numpy as np
from PIL import Image

__all__ = ["BasePredictor"]


class BasePredictor(ABC):
    """Base class of predictors.

    Attributes:
        classes: dataset id and name of each class in the order of the model's outputs.
        stuff_classes: name of each class of its semantic segmentation; empty without one.
        panoptic: arguments of :func:`~halodet.inference.postprocessing.combine_panoptic`; None without panoptic
            segments, or where they are unknown.
    """

    classes: list[dict[str, Any]]
    stuff_classes: list[str]
    panoptic: Mapping[str, float] | None = None

    @abstractmethod
    def predict(self, image: ImageLike, /) -> dict[str, Any]:
        """Return all that the model predicts for an image, as Detectron2's models do."""

    def predict_batch(self, images: Sequence[ImageLike], /) -> list[dict[str, Any]]:
        """Return what :meth:`predict` returns for each image."""
        return [self.predict(image) for image in images]

    @overload
    def __call__(self, image: ImageLike) -> Result: ...  # type: ignore[overload-overlap]  # a str is iterable

    @overload
    def __call__(self, image: Iterable[ImageLike]) -> Iterator[Result]: ...

    def __call__(self, image: Any) -> Any:
        """Detect objects in an image, or in each image of a list, generator or other iterable.

        Args:
            image: see :func:`~halodet.inference.as_bgr.as_bgr`; or an iterable of such images, which is read while its
                results are used, so that memory does not depend on its length.

        Raises:
            PredictorError: the image has another shape or type.
            ImageError: a file cannot be read.
        """
        return next(self.stream([image])) if _is_image(image) else self.stream(image)

    def stream(self, images: Iterable[ImageLike], *, batch_size: int = 1) -> Iterator[Result]:
        """Detect objects in each image.

        Args:
            images: see :meth:`__call__`.
            batch_size: number of images that the model predicts at a time.

        Raises:
            PredictorError: an image has another shape or type, or ``batch_size`` is below 1.
            ImageError: a file cannot be read.
        """
        if batch_size < 1:
            raise PredictorError(f"batch_size={batch_size} is invalid: expected a positive integer.")
        return self._stream(iter([images] if _is_image(images) else images), batch_size)  # type: ignore[list-item]

    def _stream(self, images: Iterator[ImageLike], batch_size: int) -> Iterator[Result]:
        while given := list(itertools.islice(images, batch_size)):
            batch = [as_bgr(image) for image in given]
            for image, bgr, output in zip(given, batch, self.predict_batch(batch), strict=True):
                file_name = os.fspath(image) if isinstance(image, str | os.PathLike) else None
                yield Result.of(self, bgr, output, file_name)


def _is_image(image: Any) -> bool:
    """Return whether something is one image, or of a type that is neither an image nor a sequence of images."""
    single = str | bytes | os.PathLike | Image.Image | np.ndarray
    return isinstance(image, single) or hasattr(image, "detach") or not isinstance(image, Iterable)
