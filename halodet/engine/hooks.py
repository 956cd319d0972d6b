"""Small training hooks: throughput, moving average of the weights, precise batch norm and visualization."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

from halodet.checkpoint import Checkpointer
from halodet.errors import ImageError
from halodet.inference.visualize import draw_output
from halodet.utils.image_io import read_image

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import Augmentation
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_context
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

logger = logging.getLogger(__name__)


class Throughput(HookBase):
    """Put images_per_second, data_share and memory_mib into the event storage.

    data_share is the fraction of an iteration, 0 to 1, that the slowest rank waits for data. memory_mib is the peak
    memory of the main process: of its GPU, or of the host without one.

    Args:
        images_per_iter: number of images per iteration on all ranks together.
    """

    def __init__(self, images_per_iter: int) -> None:
        self._images_per_iter = images_per_iter

    def after_step(self) -> None:
        storage, latest = self.trainer.storage, self.trainer.storage.latest()
        seconds, iteration = latest.get("time", (0.0, -1))
        if iteration == self.trainer.iter and seconds > 0:  # Detectron2 does not time the first iterations
            storage.put_scalar("images_per_second", self._images_per_iter / seconds)
            if "data_time" in latest:
                storage.put_scalar("data_share", min(latest["data_time"][0] / seconds, 1.0))
        memory = peak_memory()
        if memory is not None:
            storage.put_scalar("memory_mib", memory, smoothing_hint=False)


def peak_memory() -> float | None:
    """Return the peak memory in MiB that PyTorch allocated on the GPU, or the process on the host; None if unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def ema_decay(decay: float, updates: int) -> float:
    """Return the decay of the moving average after ``updates`` updates: min(decay, (1 + updates) / (10 + updates)).

    The lower decay at the start lets the average follow the weights while they change quickly.

    Source: ``num_updates`` of TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + updates) / (10 + updates))


class EMA(HookBase):
    """Keep an exponential moving average of the weights, and save it as ``model_final_ema.pth`` after training.

    The average starts as the weights after the first step. Parameters are averaged; buffers are copied. Add ``average``
    to the checkpointer to save and resume it.

    Args:
        model: model being trained.
        decay: final decay of the average, in [0, 1).
        output_dir: folder of ``model_final_ema.pth``.
    """

    def __init__(self, model: nn.Module, decay: float, output_dir: str) -> None:
        self._decay, self._output_dir = decay, output_dir
        self.average = AveragedModel(unwrap_ddp(model), multi_avg_fn=self._update).requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """Detector with the averaged weights."""
        return self.average.module

    def before_train(self) -> None:
        if self.average.n_averaged:
            return
        self.model.load_state_dict(unwrap_ddp(self.trainer.model).state_dict())
        if self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint has no EMA (MODEL.EMA): starting it at iteration %d", self.trainer.start_iter
            )

    def after_step(self) -> None:
        self.average.update_parameters(unwrap_ddp(self.trainer.model))

    def after_train(self) -> None:
        # Not in the last after_step, so that a failed write cannot prevent the run's own checkpoint.
        if self.trainer.iter >= self.trainer.max_iter:
            checkpointer = _UntaggedCheckpointer(self.model, self._output_dir)
            checkpointer.save("model_final_ema", iteration=self.trainer.max_iter - 1)

    @torch.no_grad()
    def _update(self, averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
        # n_averaged is on the CPU; the copy that AveragedModel passes is on the GPU, and reading it would synchronize.
        weight = 1 - ema_decay(self._decay, int(self.average.n_averaged))
        for average, parameter in zip(averages, weights, strict=True):
            average.lerp_(parameter, weight)


class _UntaggedCheckpointer(Checkpointer):
    """Checkpointer whose files no run resumes from."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class EvalHook(hooks.EvalHook):
    """Detectron2's EvalHook, which after an error in the last iteration would evaluate, and wait for ended ranks."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class PreciseBN(hooks.PreciseBN):
    """Detectron2's PreciseBN with data that depend on the iteration only, so that resuming gives equal statistics."""

    def update_stats(self) -> None:
        if hasattr(self._data_loader, "loader"):
            previous_updates = self.trainer.iter // self._period if self._period > 0 else 0
            self._data_loader.loader.seek(previous_updates * self._num_iter)
            with contextlib.closing(self._data_loader):
                super().update_stats()
            self._data_iter = None
        else:  # not halodet's loader
            super().update_stats()


class VisualizePredictions(HookBase):
    """Draw predictions on some images of a dataset every ``period`` iterations and after the last one.

    The images are evenly spaced in the dataset and the same each time. Unreadable ones are skipped with a warning.
    Runs on the main process only and draws no random numbers, so training does not depend on it.

    Args:
        dataset: name of the dataset.
        period: iterations between two visualizations.
        num_images: number of images.
        image_format: order of the model's input channels, ``"BGR"`` or ``"RGB"``.
        augmentation: resizes an image for the model.
        threshold: score threshold.
    """

    def __init__(
        self,
        dataset: str,
        period: int,
        num_images: int,
        *,
        image_format: str,
        augmentation: Augmentation,
        threshold: float = 0.5,
    ) -> None:
        self._dataset, self._period, self._num_images = dataset, period, num_images
        self._image_format, self._augmentation, self._threshold = image_format, augmentation, threshold
        self._images: dict[str, np.ndarray] | None = None

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self._period == 0 or next_iter == self.trainer.max_iter:
            self._visualize()

    def _visualize(self) -> None:
        if self._images is None:
            self._images = self._read_images()
        model = unwrap_ddp(self.trainer.model)
        for name, image in self._images.items():
            with inference_context(model), torch.no_grad():
                output = model([self._model_input(image)])[0]
            try:
                rgb = self._draw(image, output)
            except Exception as error:  # no drawing is worth a training run
                logger.warning("Could not draw the predictions on %s (%s: %s)", name, type(error).__name__, error)
                continue
            self.trainer.storage.put_image(f"predictions/{name}", np.ascontiguousarray(rgb.transpose(2, 0, 1)))

    def _draw(self, image: np.ndarray, output: dict[str, Any]) -> np.ndarray:
        """Return the image (H, W, 3), RGB, with the predictions of any of Detectron2's meta-architectures."""
        metadata = MetadataCatalog.get(self._dataset)
        names = metadata.get("thing_classes", ()), metadata.get("stuff_classes", ())
        return draw_output(image, output, *names, threshold=self._threshold)[:, :, ::-1]

    def _model_input(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        image = image[:, :, ::-1] if self._image_format == "RGB" else image
        image = self._augmentation.get_transform(image).apply_image(image)
        return {"image": torch.as_tensor(image.transpose(2, 0, 1).astype("float32")), "height": height, "width": width}

    def _read_images(self) -> dict[str, np.ndarray]:
        """Return the images as name -> (H, W, 3) uint8 BGR."""
        records = DatasetCatalog.get(self._dataset)
        images = {}
        for index in np.linspace(0, len(records) - 1, min(self._num_images, len(records))).round().astype(int):
            file = records[index]["file_name"]
            try:
                images[Path(file).stem] = read_image(file)
            except ImageError as error:
                logger.warning("Skipped an image in the visualization: %s", error)
        return images


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel; other modules unchanged."""
    return model.module if isinstance(model, DistributedDataParallel) else model
