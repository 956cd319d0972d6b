"""Calls of a predictor with one image or many."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from halodet.inference.as_bgr import ImageLike, as_bgr
from halodet.inference.result import Result

import numpy as np
from PIL import Image

__all__ = ["BasePredictor"]


class BasePredictor(ABC):
    """Base class of predictors.

    Attributes:
        classes: dataset id and name of each class in the order of the model's outputs.
        stuff_classes: name of each class of its semantic segmentation; empty without one.
    """

    classes: list[dict[str, Any]]
    stuff_classes: list[str]

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
        is_image = isinstance(image, str | os.PathLike | Image.Image | np.ndarray) or hasattr(image, "detach")
        if is_image or not isinstance(image, Iterable):
            return next(self.stream([image]))
        return self.stream(image)

    def stream(self, images: Iterable[ImageLike], *, batch_size: int = 1) -> Iterator[Result]:
        """Detect objects in each image; ``batch_size`` images are predicted at a time."""
        iterator = iter(images)
        while batch := [as_bgr(image) for image in itertools.islice(iterator, batch_size)]:
            for bgr, output in zip(batch, self.predict_batch(batch), strict=True):
                yield Result(bgr, output, self.classes, self.stuff_classes)
