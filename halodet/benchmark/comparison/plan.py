"""The runs of a comparison: their names, folders, options and settings."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halodet.config.keys import leaf_values
from halodet.config.load import find_config, load_config
from halodet.config.projects import import_projects
from halodet.errors import ConfigError
from halodet.solver.lr_scaling import scale_to_batch

from detectron2.config import CfgNode

_MAX_FOLDER_NAME = 40


@dataclass(frozen=True, eq=False)
class Run:
    """One training with its evaluation.

    Attributes:
        name: name of the config and variant.
        value: value of the key of ``--vary``; None without it.
        seed: seed of the run.
        folder: output folder of the run.
        config_file: path of the config.
        options: config overrides, KEY VALUE ...
        settings: what the result depends on, as key -> value; see :func:`settings_of`.
        max_iter: number of iterations.
    """

    name: str
    value: str | None
    seed: int
    folder: Path
    config_file: Path
    options: tuple[str, ...]
    settings: dict[str, str]
    max_iter: int

    def __str__(self) -> str:
        return " ".join([self.name, *([] if self.value is None else [self.value]), f"seed {self.seed}"])


def make_plan(args: argparse.Namespace) -> list[Run]:
    """Return the runs of the arguments of :func:`~halodet.benchmark.comparison.arguments.parse`, seeds innermost.

    Raises:
        ConfigError: a config or an option is invalid, or two runs have the same name.
    """
    projects = import_projects(args.imports)
    configs = [find_config(config) for config in args.config_file]
    key, *values = args.vary or ("", "")
    shared = _shared_settings(args)
    runs = []
    for (path, variant), name in _named(configs, list(args.variants)).items():
        for value in values:
            options = [*args.opts, *args.variants[variant], *([key, value] if key else [])]
            cfg = load_config(str(path), options, add_configs=projects, allow_unsafe=args.allow_unsafe_config)
            if not args.val_json and len(cfg.DATASETS.TEST) != 1:
                raise ConfigError(f"DATASETS.TEST={cfg.DATASETS.TEST} of {path} is invalid: expected one dataset.")
            folder = args.output / name / (folder_name(value) if key else "")
            for seed in args.seeds:
                output = folder / f"seed{seed}"
                runs.append(
                    Run(
                        name,
                        value if key else None,
                        seed,
                        output,
                        path,
                        (*options, "SEED", str(seed), "OUTPUT_DIR", str(output)),
                        settings_of(cfg) | {"SEED": str(seed)} | shared,
                        scale_to_batch(cfg, log=False).SOLVER.MAX_ITER,
                    )
                )
    return runs


def settings_of(cfg: CfgNode) -> dict[str, str]:
    """Return the values of all keys of a config, except for the output folder, as strings."""
    return {key: str(value) for key, value in leaf_values(cfg).items() if key != "OUTPUT_DIR"}


def _shared_settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that results depend on, with a hash of each json file."""
    settings = {"--num-gpus": str(args.num_gpus), "--crowds-as-objects": str(args.crowds_as_objects)}
    settings["--import"] = ", ".join(args.imports)
    for name in ("train_json", "train_images", "val_json", "val_images"):
        path = getattr(args, name)
        settings[f"--{name.replace('_', '-')}"] = _describe_file(Path(path)) if path else ""
    return settings


def _describe_file(path: Path) -> str:
    if path.is_dir():
        return str(path.resolve())
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return f"{path.resolve()} (sha256 {digest.hexdigest()[:16]})"


def folder_name(value: str) -> str:
    """Return a folder name for a config value: the value itself, or its letters and digits and a hash."""
    name = re.sub(r"[^\w.+-]+", "_", value).strip("_.")[:_MAX_FOLDER_NAME]
    return name if name and name == value else f"{name}-{hashlib.sha256(value.encode()).hexdigest()[:6]}".lstrip("-")


def _named(configs: Sequence[Path], variants: Sequence[str]) -> dict[tuple[Path, str], str]:
    """Return the name of each config and variant: only the variant if there is one config."""
    names = config_names(configs)
    named = {}
    for path, config in zip(configs, names, strict=True):
        for variant in variants:
            parts = [config, variant] if len(configs) > 1 else [variant or config]
            named[path, variant] = "-".join(filter(None, parts))
    _check_different(list(named.values()))
    return named


def config_names(configs: Sequence[Path]) -> list[str]:
    """Return the file names of configs without suffix, after as many folders as needed to distinguish them.

    Raises:
        ConfigError: a config is given twice.
    """
    _check_different([str(path.resolve()) for path in configs])
    parts = [path.resolve().with_suffix("").parts for path in configs]
    names = []
    for part in parts:
        depth = 1
        while depth < len(part) and sum(other[-depth:] == part[-depth:] for other in parts) > 1:
            depth += 1
        names.append("-".join(part[-depth:]))
    return names


def _check_different(names: list[str]) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"--config-file or --variant is invalid: {count} of them are named {name}. Fix: rename one.")
