"""Parameters and multiply-adds of the models of a comparison, counted in another process.

On the CPU, the peak memory of a run includes that of the process which starts it, so that process must stay small.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from halodet.benchmark.measure import first_line
from halodet.benchmark.model_cost import analyze
from halodet.config.load import load_config
from halodet.config.projects import import_projects
from halodet.errors import ConfigError

import torch
import yaml
from detectron2.modeling import build_model

_SOLVER_KEYS = ("SOLVER", "SEED", "OUTPUT_DIR")  # the model does not depend on them


@dataclass(frozen=True)
class ModelFigures:
    """Numbers of parameters, and of multiply-adds for one image of ``height`` times ``width`` pixels."""

    parameters: int
    backbone_parameters: int
    multiply_adds: int
    backbone_multiply_adds: int
    height: int
    width: int


def count_models(
    configs: Sequence[Path | None], imports: Sequence[str], size: tuple[int, int] | None
) -> list[ModelFigures | None]:
    """Count parameters and multiply-adds of each model; equal models are counted once.

    Args:
        configs: config.yaml of a run; None gives None.
        imports: modules of ``--import``.
        size: height and width of the image; None for a square of INPUT.MIN_SIZE_TEST.

    Returns:
        The figures of each config; None where counting failed, which is printed.
    """
    keys = [_model_key(path) if path else None for path in configs]
    first = {key: path for key, path in reversed(list(zip(keys, configs, strict=True))) if key and path}
    figures: dict[str, ModelFigures] = {}
    if not first:
        return [None] * len(keys)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {key: pool.submit(count_model, path, tuple(imports), size) for key, path in first.items()}
        for key, future in futures.items():
            try:
                figures[key] = future.result()
            except Exception as error:  # the process may have been killed; training is worth more than these figures
                print(f"Cannot count multiply-adds of {first[key]}: {first_line(error)}", flush=True)
    return [figures.get(key) if key else None for key in keys]


def count_model(config: Path, imports: Sequence[str], size: tuple[int, int] | None) -> ModelFigures:
    """Count parameters and multiply-adds of the model of a run's config.yaml, on the CPU.

    The number of multiply-adds of the heads depends on the proposals of random weights, which a fixed seed draws.
    """
    for name in ("fvcore", "detectron2", "halodet", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    projects = import_projects(imports)
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"], add_configs=projects, train=False)
    height, width = size or (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST)
    if not height:
        raise ConfigError(f"INPUT.MIN_SIZE_TEST={height} of {config} is not an image size. Fix: give --size.")
    torch.manual_seed(0)
    rows = {name: numbers for name, *numbers in analyze(build_model(cfg).eval(), height, width)}
    (parameters, flops, _), (backbone_parameters, backbone_flops, _) = rows["whole model"], rows["backbone"]
    return ModelFigures(
        round(1e6 * parameters), round(1e6 * backbone_parameters), round(1e9 * flops), round(1e9 * backbone_flops),
        height, width,
    )  # fmt: skip


def _model_key(config: Path) -> str:
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    return json.dumps({key: value for key, value in values.items() if key not in _SOLVER_KEYS})
