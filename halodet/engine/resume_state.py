"""What a run is beside its weights, optimizer and schedule: seed, place in the data, random numbers, what modules keep to themselves."""

from __future__ import annotations

import logging
import time
from typing import Any

from halodet.data import ResumableTrainLoader
from halodet.engine.config_diff import changed, settings
from halodet.utils import rng

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

# Attributes that Detectron2's dense detectors average over iterations and leave out of their state dict.
_AVERAGES = ("loss_normalizer",)


class RunState(HookBase):
    """Makes a run that goes on from a checkpoint do, bit for bit, what it would have done without the interruption.

    To be the first hook. After each step it takes down the random states, and before the next it puts them back: what hooks draw in
    between, an evaluation for example, does not count, so that it does not matter either whether a checkpoint was written before or after.
    The images of a batch do not depend on these states at all (:class:`halodet.data.ResumableTrainLoader`).

    Where it goes on with another config, other data or another number of processes, a warning says so; with another batch the data go on
    after the images that were seen.

    Args:
        stream: the run's training data.
        model: to be trained.
        cfg: the run's config.
    """

    def __init__(self, stream: ResumableTrainLoader, model: nn.Module, cfg: CfgNode) -> None:
        self.stream, self.model = stream, model
        self._batch, self._settings = cfg.SOLVER.IMS_PER_BATCH, settings(cfg) | {"dataset": stream.fingerprint}
        self.started = time.time()
        self._random: dict[str, Any] | None = None
        self._of_all: list[dict[str, Any]] | None = None

    def before_step(self) -> None:
        if self._random is not None:
            rng.restore(self._random)
        self._of_all = None

    def after_step(self) -> None:
        self._random = rng.capture()

    def gather(self) -> None:
        """Bring together what each process has of its own; to be called in all of them before the first writes a checkpoint."""
        own = self._own()
        self._of_all = comm.gather(own) or [own]

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.stream.seed,
            "started": self.started,
            "batches": self.stream.batches,
            "batch": self._batch,
            "settings": self._settings,
            "processes": self._of_all or [self._own()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = state["started"]
        self.stream.seek(state["batches"] * state.get("batch", self._batch) // self._batch)
        told = changed(state.get("settings", {}), self._settings)
        if told:
            logger.warning(told)
        processes, size = state["processes"], comm.get_world_size()
        if len(processes) != size:
            logger.warning(
                "A run of %d processes goes on with %d: not as it would have gone on by itself.", len(processes), size
            )
        if state["seed"] != self.stream.seed:
            logger.warning(
                "A run with SEED %d goes on with %d: its images come in another order.", state["seed"], self.stream.seed
            )
        if comm.get_rank() < len(processes):
            own = processes[comm.get_rank()]
            self._random = own["random"]
            for name, value in own["averages"].items():
                module, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(module), attribute, value)

    def _own(self) -> dict[str, Any]:
        averages = {
            f"{name}.{attribute}": float(vars(module)[attribute])
            for name, module in self.model.named_modules()
            for attribute in _AVERAGES
            if attribute in vars(module)
        }
        return {"random": self._random or rng.capture(), "averages": averages}
