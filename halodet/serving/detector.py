"""Detector that the clients of a server share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from halodet.errors import HalodetError, ImageError
from halodet.inference.base_predictor import BasePredictor
from halodet.inference.detections import Detections, to_numpy
from halodet.inference.result import Result
from halodet.serving.fair_lock import FairLock
from halodet.serving.packed_masks import PackedMasks
from halodet.utils.image_io import decode_image

import numpy as np

__all__ = ["Detector", "ModelError", "StoredResult"]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class ModelError(HalodetError, RuntimeError):
    """The model failed on an image."""


class StoredResult:
    """Everything that a model found in an image, with packed masks, so that it can be kept in memory.

    Args:
        image: (H, W, 3) uint8 BGR image.
        output: what the predictor returns for the image.
        detector: the detector.
    """

    def __init__(self, image: np.ndarray, output: dict[str, Any], detector: Detector) -> None:
        output = dict(output)
        if "instances" in output:
            found = output["instances"]
            found = found if isinstance(found, Detections) else Detections.from_instances(found)
            if found.masks is not None:
                packed: Any = PackedMasks(found.masks)
                found = Detections(found.image_size, found.boxes, found.scores, found.classes, packed, found.keypoints)
            output["instances"] = found
        if "sem_seg" in output:
            values = to_numpy(output["sem_seg"])
            output["sem_seg"] = (values.argmax(0) if values.ndim == 3 else values).astype(np.int16)
        self._result = Result.of(detector, image, output)

    def filter(self, score_threshold: float, names: Collection[str] | None = None) -> Result:
        """Return what :meth:`Result.filter` returns.

        Args:
            score_threshold: minimum score.
            names: names of classes; None for all.
        """
        return self._result.filter(score_threshold, names)


class Detector:
    """Predictor that several threads share; it predicts one image at a time, in the order of the calls.

    Args:
        predictor: a :class:`~halodet.inference.Predictor` or :class:`~halodet.inference.ExportedPredictor`.
        name: name of the model.
        min_threshold: score below which the predictor returns no objects.
        score_threshold: minimum score where a request has none.
        max_pixels: maximum number of pixels of an image.

    Attributes:
        classes: dataset id and name of each class of things.
        stuff_classes: name of each semantic class.
        panoptic: arguments of :func:`~halodet.inference.postprocessing.combine_panoptic`; None without them.
    """

    def __init__(
        self,
        predictor: BasePredictor,
        name: str,
        *,
        min_threshold: float,
        score_threshold: float,
        max_pixels: int,
    ) -> None:
        self._predictor, self._lock = predictor, FairLock()
        self.name, self.max_pixels = name, max_pixels
        self.min_threshold, self.score_threshold = min_threshold, score_threshold
        self.classes, self.stuff_classes = predictor.classes, predictor.stuff_classes
        self.panoptic = predictor.panoptic

    def read(self, data: bytes, name: str) -> np.ndarray:
        """Decode an image, see :func:`~halodet.utils.image_io.decode_image`."""
        return decode_image(data, name, self.max_pixels)

    def predict(self, image: np.ndarray) -> StoredResult:
        """Run the model on an (H, W, 3) uint8 BGR image.

        Raises:
            ImageError: the model does not take the image.
            ModelError: the model failed.
        """
        return self._run(image, lambda output: StoredResult(image, output, self))

    def predict_frame(self, image: np.ndarray) -> dict[str, Any]:
        """Run the model on a frame of a video, and return what the predictor returns.

        Args:
            image: (H, W, 3) uint8 BGR image.

        Raises:
            ImageError: the model does not take the image.
            ModelError: the model failed.
        """
        return self._run(image, dict)

    def _run(self, image: np.ndarray, convert: Callable[[dict[str, Any]], _T]) -> _T:
        with self._lock:
            try:
                return convert(self._predictor.predict(image))
            except ImageError:
                raise
            except Exception as error:  # models raise nearly anything
                logger.exception("The model failed on an image of %d x %d pixels", image.shape[1], image.shape[0])
                raise ModelError(f"The model failed on this image ({type(error).__name__}).") from error
