"""Drawings of what a model in training detects, for TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from halodet.errors import ImageError
from halodet.inference import draw, read_image

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


class DrawPredictions(HookBase):
    """Every TEST.VIS_PERIOD iterations, and after the last one, draw what is detected on TEST.VIS_IMAGES images of a dataset.

    They are the same images each time, spread evenly over the dataset; one that cannot be read is left out, and named. The first process
    does it alone. Nothing is drawn by lot, so a run is the same with drawings and without.

    Args:
        cfg: the run's config.
        dataset: name of the dataset.
        threshold: lowest score that is drawn.
    """

    def __init__(self, cfg: CfgNode, dataset: str, *, threshold: float = 0.5) -> None:
        self._cfg, self._dataset, self._threshold = cfg, dataset, threshold
        self._pictures: dict[str, np.ndarray] | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._cfg.TEST.VIS_PERIOD == 0 or done == self.trainer.max_iter:
            self._draw()

    def _draw(self) -> None:
        if self._pictures is None:
            self._pictures = self._read()
        names = MetadataCatalog.get(self._dataset).thing_classes
        model = self.trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        for name, picture in self._pictures.items():
            with inference_context(model), torch.no_grad():
                instances = model([self._input(picture)])[0]["instances"]
            drawing = draw(picture, instances, names, threshold=self._threshold)
            self.trainer.storage.put_image(
                f"predictions/{name}", np.ascontiguousarray(drawing[:, :, ::-1].transpose(2, 0, 1))
            )

    def _input(self, picture: np.ndarray) -> dict[str, Any]:
        resize = ResizeShortestEdge(self._cfg.INPUT.MIN_SIZE_TEST, self._cfg.INPUT.MAX_SIZE_TEST)
        image = resize.get_transform(picture).apply_image(
            picture[:, :, ::-1] if self._cfg.INPUT.FORMAT == "RGB" else picture
        )
        height, width = picture.shape[:2]
        return {"image": torch.as_tensor(image.transpose(2, 0, 1).astype("float32")), "height": height, "width": width}

    def _read(self) -> dict[str, np.ndarray]:
        """File name -> (H, W, 3) uint8 BGR picture."""
        entries = DatasetCatalog.get(self._dataset)
        pictures = {}
        for index in np.linspace(0, len(entries) - 1, min(self._cfg.TEST.VIS_IMAGES, len(entries))).round().astype(int):
            try:
                pictures[Path(entries[index]["file_name"]).stem] = read_image(entries[index]["file_name"])
            except ImageError as error:
                logger.warning(f"No drawings of an image: {error}")
        return pictures
