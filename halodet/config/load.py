"""Read a config file and overrides into a checked Detectron2 config."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

from halodet.attention.triton_ops import triton_unavailable_reason
from halodet.backbones.build import TIMM_BACKBONES
from halodet.backbones.timm_backbone import apply_pretrained_preprocessing
from halodet.checkpoint import ModelSpec, check_fit, latest_checkpoint, read_checkpoint, with_query
from halodet.config.defaults import add_halodet_config, config_dir
from halodet.config.ranges import check_ranges
from halodet.config.yaml_file import check_config_files
from halodet.data.transforms import check_input
from halodet.errors import CheckpointError, ConfigError
from halodet.evaluation.tta import check_tta
from halodet.solver.build import OPTIMIZERS, lr_factors
from halodet.solver.lr_scaling import scale_to_batch

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

logger = logging.getLogger(__name__)

_TYPE_MISMATCH = re.compile(
    r"Type mismatch \(<class '(.*?)'> vs\. <class '(.*?)'>\) with values \((.*) vs\. (.*)\) for config key: (\S+)"
)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults and halodet's, then ``config_file``, then ``opts``; nothing in the file is executed.

    Args:
        config_file: path of a YAML file, or its name inside halodet's own configs (``mask_rcnn_halo_h4.yaml``).
        opts: KEY VALUE pairs that override the file.

    Raises:
        ConfigError: the file or a key of it is not usable, or asks for a GPU operator or detector part that is not installed.
    """
    cfg = get_cfg()
    add_halodet_config(cfg)
    path = find_config(config_file)
    try:
        check_config_files(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"{path} cannot be used: {_key_problem(cfg, error)}") from error
    flags = [word for word in opts if word.startswith("--")]
    if flags:
        raise ConfigError(f"{flags[0]} stands among the overrides {' '.join(opts)}: flags come before them")
    if len(opts) % 2:
        raise ConfigError(f"overrides come in pairs KEY VALUE, got {len(opts)} words: {' '.join(opts)}")
    for key in opts[::2]:
        above = key.rpartition(".")[0]
        if above in _keys(cfg):  # yacs looks for the last part in the value
            raise ConfigError(f"override not usable: {_unknown_key(cfg, key)}")
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"override not usable: {_key_problem(cfg, error)}") from error
    _check_device(cfg)
    if cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES:
        try:
            apply_pretrained_preprocessing(cfg)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"MODEL.TIMM.NAME: {_sentence(error)}") from error
    _check_compiled_operators(cfg)
    try:
        check_ranges(cfg)
        check_input(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_solver(cfg)
    if not 0.0 <= cfg.MODEL.WEIGHTS_MIN_LOADED <= 1.0:
        raise ConfigError(f"MODEL.WEIGHTS_MIN_LOADED is {cfg.MODEL.WEIGHTS_MIN_LOADED}, expected a share from 0 to 1")
    from halodet.engine.wandb_writer import check_wandb

    try:
        check_wandb(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if min(cfg.TEST.VIS_PERIOD, cfg.TEST.VIS_IMAGES) < 0:
        raise ConfigError(
            f"TEST.VIS_PERIOD is {cfg.TEST.VIS_PERIOD} and VIS_IMAGES {cfg.TEST.VIS_IMAGES}, expected 0 or more"
        )
    if not 0.0 <= cfg.MODEL.EMA.DECAY < 1.0:
        raise ConfigError(f"MODEL.EMA.DECAY is {cfg.MODEL.EMA.DECAY}, expected a share from 0 to below 1")
    _check_model(cfg)
    cfg.freeze()
    return cfg


def find_config(config_file: str) -> Path:
    """The file itself, or the one of that name in halodet's configs.

    Raises:
        ConfigError: there is neither.
    """
    if not config_file:
        raise ConfigError(
            "no config given: add --config-file, for example --config-file configs/mask_rcnn_halo_h4.yaml"
        )
    path = Path(config_file)
    own = config_dir() / (config_file if path.suffix else f"{config_file}.yaml")
    for candidate in (path, own):
        if candidate.is_file():
            return candidate
    names = [
        str(p.relative_to(config_dir())) for p in sorted(config_dir().rglob("*.yaml")) if not p.name.startswith("Base")
    ]
    near = difflib.get_close_matches(path.name, names, n=3) or names[:3]
    raise ConfigError(
        f"there is no config {config_file}, neither there nor in {config_dir()}: the nearest are {', '.join(near)}"
    )


def _key_problem(cfg: CfgNode, error: Exception) -> str:
    """yacs's message; with the nearest keys where a key is unknown, and with what is expected where a value is of another type."""
    message = _sentence(error)
    if "Non-existent" in message:
        return _unknown_key(cfg, message.split()[-1].strip("'\""))
    wrong = _TYPE_MISMATCH.fullmatch(message)
    if not wrong:
        return message
    expected, given, example, value, key = wrong.groups()
    if expected.endswith("CfgNode"):
        below = next(known for known in _keys(cfg) if known.startswith(f"{key}."))
        return f"{key} is {value}, expected keys below it such as {below}"
    return f"{key} is {value}, of type {given}, expected one of type {expected} such as {example}"


def _unknown_key(cfg: CfgNode, key: str) -> str:
    known = {name.casefold(): name for name in _keys(cfg)}
    near = [known[name] for name in difflib.get_close_matches(key.casefold(), known, n=3, cutoff=0.5)]
    return f"there is no config key {key}" + (f": the nearest are {', '.join(near)}" if near else "")


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in cfg.items():
        keys += [*_keys(value, f"{prefix}{key}.")] if isinstance(value, CfgNode) else [f"{prefix}{key}"]
    return keys


def _sentence(error: BaseException) -> str:
    """The error's message on one line; a KeyError's, which may be the bare key, as a sentence."""
    message = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, KeyError) and " " not in message:
        return f"something in it asks for {message!r}, which is not there"
    return message or type(error).__name__


def _check_device(cfg: CfgNode) -> None:
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU that PyTorch can use was found: running on the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but PyTorch sees {torch.cuda.device_count()} GPUs, counted from 0"
        )
    from halodet.engine.performance import check_speed

    try:
        check_speed(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key, node in (("MODEL.HALONET", cfg.MODEL.HALONET), ("MODEL.TIMM", cfg.MODEL.TIMM)):
        problem = triton_unavailable_reason(device) if node.BACKEND == "triton" else None
        if problem:
            raise ConfigError(f"{key}.BACKEND is triton, but {problem}: set it to auto")


def _check_compiled_operators(cfg: CfgNode) -> None:
    """Rotated boxes and deformable convolution live in Detectron2's compiled extension, which not every build has."""
    wanted = {
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE),
        f"MODEL.PROPOSAL_GENERATOR.NAME {cfg.MODEL.PROPOSAL_GENERATOR.NAME}": cfg.MODEL.PROPOSAL_GENERATOR.NAME
        == "RRPN",
        f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME}": cfg.MODEL.ROI_HEADS.NAME == "RROIHeads",
    }
    wanted = [key for key, asked in wanted.items() if asked]
    if not wanted:
        return
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{', '.join(wanted)} needs Detectron2's compiled operators, which the installed detectron2 does not have: "
            "install a compiled one as https://detectron2.readthedocs.io/tutorials/install.html says"
        ) from error


def _check_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise ConfigError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}, expected one of {list(OPTIMIZERS)}")
    if solver.GRAD_ACCUM_STEPS < 1:
        raise ConfigError(f"SOLVER.GRAD_ACCUM_STEPS is {solver.GRAD_ACCUM_STEPS}, expected 1 or more")
    from halodet.engine.nan_guard import Policy

    try:
        Policy(solver.NON_FINITE_POLICY, solver.NON_FINITE_MAX_STEPS)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not 0 < solver.BACKBONE_MULTIPLIER < math.inf:
        raise ConfigError(
            f"SOLVER.BACKBONE_MULTIPLIER is {solver.BACKBONE_MULTIPLIER}, expected more than 0 (FREEZE_AT freezes stages)"
        )
    if not 0 < solver.LR_LAYER_DECAY <= 1:
        raise ConfigError(
            f"SOLVER.LR_LAYER_DECAY is {solver.LR_LAYER_DECAY}, expected more than 0 and at most 1, which is none"
        )
    if not 0 <= solver.WEIGHT_DECAY_REL_POS < math.inf:
        raise ConfigError(f"SOLVER.WEIGHT_DECAY_REL_POS is {solver.WEIGHT_DECAY_REL_POS}, expected 0 or more")
    if solver.CHECKPOINT_MAX_TO_KEEP < 0:
        raise ConfigError(
            f"SOLVER.CHECKPOINT_MAX_TO_KEEP is {solver.CHECKPOINT_MAX_TO_KEEP}, expected how many checkpoints stay, or 0 for all"
        )
    try:
        cfg = scale_to_batch(cfg, log=False)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR))
    except (ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"the schedule under SOLVER cannot be used: {_sentence(error)}") from error


def _check_model(cfg: CfgNode) -> None:
    """Build the model without memory, so that what does not fit together is said before anything is loaded."""
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        known = [name for name, _ in BACKBONE_REGISTRY]
        near = difflib.get_close_matches(cfg.MODEL.BACKBONE.NAME, known, n=3) or known
        raise ConfigError(f"there is no backbone {cfg.MODEL.BACKBONE.NAME!r}: the nearest are {', '.join(near)}")
    try:
        model = _blank_model(cfg)
    except (
        ImportError,
        ValueError,
        TypeError,
        AssertionError,
        KeyError,
        AttributeError,
        ZeroDivisionError,
        RuntimeError,
    ) as error:
        raise ConfigError(f"the model of this config cannot be built: {_sentence(error)}") from error
    try:
        lr_factors(cfg, model)
        check_tta(cfg, model)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _blank_model(cfg: CfgNode) -> nn.Module:
    blank = cfg.clone()
    blank.defrost()
    blank.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(blank)


def _target(cfg: CfgNode) -> ModelSpec:
    """What weights are to fit; a model without memory does not tell which pixels it takes."""
    return dataclasses.replace(
        ModelSpec.of(_blank_model(cfg)),
        input_format=cfg.INPUT.FORMAT,
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
    )


def check_weights(cfg: CfgNode, *, eval_only: bool, resume: bool, allow_pickle: bool = False) -> str:
    """The weights a run starts from: MODEL.WEIGHTS, or the newest checkpoint in OUTPUT_DIR when resuming; they are there, and they fit.

    A name such as ``detectron2://...`` is fetched. Before any data is loaded the file is read and matched with the model, without memory
    for it; an evaluation, and a run that goes on, must fill all of it.

    Raises:
        ConfigError: the file does not exist, or an evaluation has no weights at all.
        CheckpointError: it cannot be fetched or read, or fills too little of the model.
    """
    weights = cfg.MODEL.WEIGHTS
    found = latest_checkpoint(cfg.OUTPUT_DIR, allow_pickle=allow_pickle) if resume else None
    if found is not None:
        check_fit(_target(cfg), found.checkpoint, found.path, min_loaded=cfg.MODEL.WEIGHTS_MIN_LOADED, exact=True)
        return found.path
    if eval_only and not weights:
        looked = f", and {cfg.OUTPUT_DIR} holds no checkpoint to resume from" if resume else ""
        raise ConfigError(f"--eval-only needs trained weights{looked}: add MODEL.WEIGHTS path/to/model_final.pth")
    if not weights:
        return weights
    url = urlparse(weights)
    try:
        file = PathManager.get_local_path(url._replace(query="").geturl())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"MODEL.WEIGHTS {weights} cannot be fetched ({_sentence(error)})") from error
    if not os.path.isfile(file):
        raise ConfigError(f"MODEL.WEIGHTS is {weights}, which is not a file")
    checkpoint = with_query(read_checkpoint(file, allow_pickle=allow_pickle), url.query, weights)
    check_fit(_target(cfg), checkpoint, weights, min_loaded=cfg.MODEL.WEIGHTS_MIN_LOADED, exact=eval_only)
    return weights


def with_seed(cfg: CfgNode, *, resume: bool, allow_pickle: bool = False) -> CfgNode:
    """The config with the SEED of the run, also where it is below 0: that of the checkpoint it goes on from, or one drawn now, and logged.

    To be called in every process of a run.
    """
    if cfg.SEED >= 0:
        return cfg
    from halodet.engine.resume_state import RunState

    seed = None
    if comm.is_main_process():
        found = latest_checkpoint(cfg.OUTPUT_DIR, allow_pickle=allow_pickle) if resume else None
        seed = found and found.checkpoint["trainer"].get("hooks", {}).get(RunState.__name__, {}).get("seed")
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "big") >> 1
        logger.info("SEED is %d: this run has %d; SEED %d repeats it.", cfg.SEED, seed, seed)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.all_gather(seed)[0]
    cfg.freeze()
    return cfg


def check_writable(folder: str) -> None:
    """Make ``folder`` and check that it can be written to.

    Raises:
        ConfigError: it cannot.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        probe = Path(folder) / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {folder} cannot be written to ({error.strerror}): set OUTPUT_DIR to a folder that can"
        ) from error
