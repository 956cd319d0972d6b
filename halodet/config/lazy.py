"""Read a LazyConfig and overrides into a checked config."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from halodet.config.load import find_config
from halodet.config.validate import one_line
from halodet.errors import ConfigError

import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

KEYS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
# Values of configs/lazy/common/train.py that a config written for Detectron2's own tool does not have.
_TRAIN_DEFAULTS = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "min_loaded": 0.95,
    "max_iter": 90000,
    "amp": {"enabled": False},
    "ddp": {},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
    "seed": -1,
    "grad_accum_steps": 1,
    "nan_guard": {"policy": "stop", "max_steps": 3},
    "max_bad_images": 0.05,
    "ema": {"enabled": False, "decay": 0.9999},
}


def is_lazy_config(config_file: str) -> bool:
    """Return whether a file is a LazyConfig: Python, or YAML with a ``_target_``, as Detectron2 saves them."""
    path = Path(config_file)
    if path.suffix != ".py" and path.is_file():
        return "_target_:" in path.read_text(encoding="utf-8", errors="replace")
    return path.suffix == ".py"


def load_lazy_config(config_file: str, opts: Sequence[str] = (), *, allow_unsafe: bool = False) -> DictConfig:
    """Load a LazyConfig, apply overrides, and add the values of ``train`` that it does not have.

    Args:
        config_file: path of a ``.py`` file, which is executed, or of the ``config.yaml`` of a run; or a name inside
            halodet's configs (``lazy/mask_rcnn_halo_h0.py``).
        opts: overrides ``key=value``; ``+key=value`` adds a key.
        allow_unsafe: allow a YAML file, whose targets are called.

    Raises:
        ConfigError: the file cannot be executed or is not a LazyConfig, or an override is invalid.
    """
    path = find_config(config_file)
    if path.suffix != ".py" and not allow_unsafe:
        fix = "if you trust the file, add --allow-unsafe-config" if is_lazy_config(str(path)) else "give a .py file"
        raise ConfigError(f"{path} is not a Python LazyConfig. Fix: {fix}.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pkg_resources.*")  # of Detectron2's model_zoo
            cfg = LazyConfig.load(str(path))
    except Exception as error:  # the user's own code
        raise ConfigError(f"{path} cannot be loaded: {type(error).__name__}: {one_line(error)}.") from error
    missing = [key for key in KEYS if not isinstance(cfg, DictConfig) or key not in cfg]
    if missing:
        raise ConfigError(f"{path} is not a LazyConfig for training: expected {', '.join(KEYS)}; no {missing[0]}.")
    cfg.train = OmegaConf.merge(_TRAIN_DEFAULTS, cfg.train)
    known = [key for key, _ in _items(OmegaConf.to_container(cfg))]
    for override in opts:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"Override {override} is invalid: expected key=value.")
        if not key.startswith(("+", "~")) and key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            similar = f"; similar: {', '.join(near)}" if near else ""
            raise ConfigError(f"{key} is an unknown config key{similar}. Fix: to add it, write +{override}.")
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(opts))
    except Exception as error:  # of hydra's parser and omegaconf
        raise ConfigError(f"An override is invalid: {one_line(error)}.") from error
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("CUDA is not available; using train.device=cpu")
        cfg.train.device = "cpu"
    return cfg


def set_score_threshold(cfg: DictConfig, threshold: float) -> None:
    """Set the minimum score of detections and of objects in panoptic segments, by the names of Detectron2, in place."""
    for key in flatten(cfg.model):
        if key.rpartition(".")[2] in ("test_score_thresh", "combine_instances_score_thresh"):
            OmegaConf.update(cfg.model, key, threshold)


def flatten(cfg: DictConfig) -> dict[str, str]:
    """Return the full name of every value of a config with the value as a string; interpolations are unresolved."""
    return {key: str(value) for key, value in _items(OmegaConf.to_container(cfg)) if not isinstance(value, dict | list)}


def _items(container: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full name and the value of each entry of nested dicts and lists, the inner ones included."""
    for name, value in container.items() if isinstance(container, dict) else enumerate(container):
        yield f"{prefix}{name}", value
        if isinstance(value, dict | list):
            yield from _items(value, f"{prefix}{name}.")
