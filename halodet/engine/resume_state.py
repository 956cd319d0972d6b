"""State that makes a resumed run bit-identical to an uninterrupted one: data position, random states, averages."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from halodet.data import ResumableTrainLoader
from halodet.utils import rng

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

# Averages over iterations that Detectron2's dense detectors keep outside of their state dict.
_AVERAGES = ("loss_normalizer",)
# Prefixes of keys that training does not depend on.
_IGNORED_KEYS = (
    "OUTPUT_DIR", "VERSION", "VIS_PERIOD", "DATASETS.TEST", "TEST.", "WANDB.", "DATALOADER.NUM_WORKERS",
    "DATALOADER.MAX_BAD_IMAGES", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.WEIGHTS", "SOLVER.CHECKPOINT_",
    "SOLVER.REFERENCE_", "SOLVER.NON_FINITE_POLICY",
)  # fmt: skip
# Keys whose values are part of the optimizer's state, so that the checkpoint's values are used.
_OPTIMIZER_KEYS = (
    "SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY", "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.BIAS_LR_FACTOR",
    "SOLVER.BACKBONE_LR_MULTIPLIER", "SOLVER.LR_LAYER_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS",
    "SOLVER.WEIGHT_DECAY_REL_POS",
)  # fmt: skip
_MAX_LISTED = 12


class ResumeState(HookBase):
    """Save and restore what Detectron2's checkpoints lack, so that resuming is bit-exact.

    Must be the first hook: it captures the random states after each step and restores them before the next, so that
    random numbers drawn in between, for example by an evaluation, have no influence. Differences between the checkpoint
    and the run (config, data, world size) are logged as warnings. With another batch size, the data continue after the
    images seen.

    Args:
        loader: training data; None if the run has a loader of its own, whose position cannot be restored.
        model: model being trained.
        ims_per_batch: images per batch of all ranks together.
        config: keys that training depends on, with their values, such as :func:`training_config` returns.
    """

    def __init__(
        self, loader: ResumableTrainLoader | None, model: nn.Module, ims_per_batch: int, config: Mapping[str, str]
    ) -> None:
        self.loader, self.model = loader, model
        self._ims_per_batch, self._config = ims_per_batch, dict(config)
        if loader is not None:
            self._config |= {"SEED": str(loader.seed), "dataset": loader.fingerprint}
        self.started = time.time()
        self._rng: dict[str, Any] | None = None
        self._ranks: list[dict[str, Any]] | None = None

    def before_step(self) -> None:
        if self._rng is not None:
            rng.restore(self._rng)
        self._ranks = None

    def after_step(self) -> None:
        self._rng = rng.capture()

    def gather(self) -> None:
        """Gather the state of all ranks; call it on all ranks before a checkpoint is written."""
        state = self._rank_state()
        self._ranks = comm.gather(state) or [state]

    def state_dict(self) -> dict[str, Any]:
        state = {"started": self.started, "config": self._config, "ims_per_batch": self._ims_per_batch}
        if self.loader is not None:
            state |= {"seed": self.loader.seed, "batches": self.loader.batches}
        return state | {"ranks": self._ranks or [self._rank_state()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = state["started"]
        if self.loader is not None and "batches" in state:
            self.loader.seek(state["batches"] * state["ims_per_batch"] // self._ims_per_batch)
        difference = config_diff(state["config"], self._config)
        if difference:
            logger.warning("Resuming with a config that differs from the checkpoint: %s", difference)
        ranks, rank, world_size = state["ranks"], comm.get_rank(), comm.get_world_size()
        if len(ranks) != world_size:
            message = "Resuming a %d-process run with %d processes; results will differ"
            logger.warning(message, len(ranks), world_size)
        if rank < len(ranks):
            self._rng = ranks[rank]["rng"]
            for name, value in ranks[rank]["averages"].items():
                module, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(module), attribute, value)

    def _rank_state(self) -> dict[str, Any]:
        averages = {
            f"{name}.{attribute}": vars(module)[attribute]
            for name, module in self.model.named_modules()
            for attribute in _AVERAGES
            if isinstance(vars(module).get(attribute), int | float)  # a string is an option, such as "visible"
        }
        return {"rng": self._rng or rng.capture(), "averages": averages}


def training_config(cfg: CfgNode) -> dict[str, str]:
    """Return the keys that training depends on, with their values as strings."""
    return {key: value for key, value in _flatten(cfg).items() if not key.startswith(_IGNORED_KEYS)}


def config_diff(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Describe in one line the keys that both configs have with different values; empty if there are none.

    Args:
        old: config of the checkpoint, as :func:`training_config` returns it.
        new: config of the run.
    """
    keys = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]
    text = ", ".join(f"{key}: {old[key]} -> {new[key]}" for key in keys[:_MAX_LISTED])
    if len(keys) > _MAX_LISTED:
        text += f" and {len(keys) - _MAX_LISTED} more"
    kept = ", ".join(key for key in keys if key in _OPTIMIZER_KEYS)
    if kept:
        text += f". The checkpoint's {kept} will be used; to change it, start a new run with MODEL.WEIGHTS"
    return text


def _flatten(cfg: CfgNode, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in cfg.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": str(value)}
    return flat
