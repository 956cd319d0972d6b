"""What is checked before a run starts: the model, on the device meta, and the weights it starts from."""

from __future__ import annotations

import dataclasses
import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

from halodet.checkpoint import LoadedCheckpoint, ModelSpec, check_fit, latest_checkpoint, read_weights
from halodet.checkpoint.latest import numbered
from halodet.config.validate import one_line
from halodet.data.classes import dataset_classes
from halodet.engine.check_detector import check_heads
from halodet.engine.name_keys import CANNOT_BUILD, name_keys
from halodet.errors import ConfigError
from halodet.evaluation.tta import check_tta
from halodet.solver.build import lr_factors

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

logger = logging.getLogger(__name__)


def build_meta_model(cfg: CfgNode) -> nn.Module:
    """Build the detector with :func:`build_on_meta` and check the keys that depend on its modules.

    Raises:
        ConfigError: the model cannot be built, or has no parts that SOLVER or TEST.AUG ask for.
    """

    def build(device: str) -> nn.Module:
        copy = cfg.clone()
        copy.defrost()
        copy.MODEL.DEVICE = device
        return build_model(copy)

    try:
        model = build_on_meta(build)
    except ConfigError as error:
        raise name_keys(cfg, error) from error.__cause__
    check_heads(cfg, model)
    try:
        lr_factors(model, cfg.SOLVER.BACKBONE_LR_MULTIPLIER, cfg.SOLVER.LR_LAYER_DECAY)
        check_tta(cfg, model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model


def build_on_meta(build: Callable[[str], nn.Module]) -> nn.Module:
    """Build a model without memory: call ``build`` with the device ``"meta"``.

    A model whose construction needs values, which tensors on ``meta`` do not have, is built on the CPU.

    Raises:
        ConfigError: the model cannot be built.
    """
    try:
        with torch.device("meta"):
            return build("meta")
    except Exception as error:
        logger.info("Cannot build the model on the meta device (%s); trying the CPU", one_line(error))
        try:
            return build("cpu")
        except Exception as error:
            kind = "" if isinstance(error, ValueError | KeyError) else f"{type(error).__name__}: "
            reason = one_line(error)
            if not str(error):  # an assertion without a message
                reason = f"{traceback.extract_tb(error.__traceback__)[-1].line}"
            raise ConfigError(f"{CANNOT_BUILD}: {kind}{reason}") from error


def check_weights(cfg: CfgNode, model: nn.Module, **options: bool) -> LoadedCheckpoint | None:
    """Find the weights that a run of ``cfg`` starts from; see :func:`find_weights` for ``options`` and errors."""
    target = dataclasses.replace(
        ModelSpec.of(model),
        input_format=cfg.INPUT.FORMAT,
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
        classes=None if options.get("eval_only") else dataset_classes(next(iter(cfg.DATASETS.TRAIN), "")),
    )
    min_loaded = cfg.MODEL.WEIGHTS_MIN_LOADED
    return find_weights(target, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, min_loaded=min_loaded, **options)


def find_weights(
    target: ModelSpec,
    weights: str,
    output_dir: str,
    *,
    min_loaded: float,
    eval_only: bool = False,
    resume: bool = False,
    allow_pickle: bool = False,
) -> LoadedCheckpoint | None:
    """Read the checkpoint that a run starts from and match it with the model.

    Args:
        target: description of the model, which may be on the device ``meta``.
        weights: file, URL or name of the initial weights; empty for none.
        output_dir: output folder of the run.
        min_loaded: minimum fraction of the expected tensors and parameters.
        eval_only: whether the weights must be complete.
        resume: whether to prefer the latest checkpoint in ``output_dir``.
        allow_pickle: whether to run code that pickle files hold.

    Returns:
        The checkpoint, None for random weights.

    Raises:
        ConfigError: an evaluation has no weights.
        CheckpointError: they cannot be fetched or read, or do not fit the model.
    """
    found = latest_checkpoint(output_dir, allow_pickle=allow_pickle) if resume else None
    if not resume and not eval_only:
        _warn_of_other_run(output_dir)
    if found is not None:
        check_fit(target, found.checkpoint, found.path, min_loaded=min_loaded, exact=True)
        return found
    if not weights and eval_only:
        raise ConfigError("MODEL.WEIGHTS is empty: --eval-only needs trained weights. Fix: add MODEL.WEIGHTS FILE.")
    if not weights:
        return None
    loaded = read_weights(weights, allow_pickle=allow_pickle)
    check_fit(target, loaded.checkpoint, weights, min_loaded=min_loaded, exact=eval_only)
    return loaded


def _warn_of_other_run(output_dir: str) -> None:
    names = numbered(output_dir) + (["model_final.pth"] if os.path.isfile(f"{output_dir}/model_final.pth") else [])
    if names:
        logger.warning(
            "OUTPUT_DIR=%s has checkpoints of another run (%s), which this one replaces. Fix: add --resume to continue "
            "that run, or set another OUTPUT_DIR",
            output_dir,
            names[0],
        )


def choose_seed(checkpoint: dict[str, Any] | None) -> int:
    """Return the seed of the checkpoint to resume from, or a random one, and log it."""
    state = checkpoint.get("trainer", {}).get("hooks", {}).get("ResumeState", {}) if checkpoint else {}
    seed = state.get("seed", int.from_bytes(os.urandom(4), "big") >> 1)
    logger.info("Using random seed %d; set SEED %d to reproduce this run", seed, seed)
    return seed
