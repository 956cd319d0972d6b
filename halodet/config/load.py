"""Read a config file and overrides into a validated Detectron2 config."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from halodet.backbones.build import TIMM_BACKBONES
from halodet.backbones.timm_backbone import apply_pretrained_preprocessing
from halodet.config.defaults import add_halodet_config, config_dir
from halodet.config.keys import leaf_values
from halodet.config.projects import AddConfig
from halodet.config.validate import one_line, validate
from halodet.config.value_types import check_types
from halodet.errors import ConfigError

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

_RENAMED_KEYS = {
    "STOCHASTIC_DEPTH": "DROP_PATH_RATE",
    "CHECKPOINT_ACTIVATIONS": "USE_ACT_CHECKPOINT",
    "WINDOW": "WINDOW_SIZE",
    "POSITION": "REL_POS_MODE",
    "CHECK_INPUT": "CHECK_PREPROCESSING",
    "ACCUMULATE": "GRAD_ACCUM_STEPS",
    "OPTIMIZER": "OPTIMIZER_NAME",
    "BACKBONE_MULTIPLIER": "BACKBONE_LR_MULTIPLIER",
    "BACKBONE_LR_FACTOR": "BACKBONE_LR_MULTIPLIER",
    "LAYER_DECAY": "LR_LAYER_DECAY",
    "REFERENCE_BATCH": "REFERENCE_IMS_PER_BATCH",
    "CHECKPOINT_KEEP": "CHECKPOINT_MAX_TO_KEEP",
    "NON_FINITE": "NON_FINITE_POLICY",
    "NON_FINITE_LIMIT": "NON_FINITE_MAX_STEPS",
    "WEIGHTS_MIN_FILLED": "WEIGHTS_MIN_LOADED",
    "MAX_SKIPPED": "MAX_BAD_IMAGES",
}
_TYPE_MISMATCH = re.compile(
    r"Type mismatch \(<class '(.*?)'> vs\. <class '(.*?)'>\) with values \((.*) vs\. (.*)\) for config key: (\S+)"
)
_MERGE_ERRORS = (
    yaml.YAMLError, KeyError, AssertionError, ValueError, TypeError, AttributeError, OSError, RecursionError,
)  # fmt: skip


def load_config(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    train: bool = True,
    add_configs: Iterable[AddConfig] = (),
    allow_unsafe: bool = False,
) -> CfgNode:
    """Merge ``config_file`` and ``opts`` into Detectron2's and halodet's defaults and validate the values.

    Nothing in the file is executed unless ``allow_unsafe`` is set, and no model is built.

    Args:
        config_file: path of a YAML file, or its name inside halodet's own configs (``mask_rcnn_halo_h4.yaml``).
        opts: KEY VALUE pairs that override the file.
        train: whether to validate the keys that only training uses.
        add_configs: functions of other projects that add their keys and defaults to the config. With them, values of
            Detectron2's keys that only such a project knows, as a sampler of its own, are allowed.
        allow_unsafe: allow Python tags in the file, which may run code.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, or a value is invalid.
    """
    cfg = get_cfg()
    add_halodet_config(cfg)
    for add_config in add_configs:
        try:
            add_config(cfg)
        except Exception as error:  # of another project
            name = f"{add_config.__module__}.{getattr(add_config, '__qualname__', '')}"
            raise ConfigError(f"{name}(cfg) failed: {type(error).__name__}: {one_line(error)}.") from error
    path = find_config(config_file)
    if not allow_unsafe:
        _check_yaml(str(path), ())
    try:
        cfg.merge_from_file(str(path), allow_unsafe=allow_unsafe)
    except _MERGE_ERRORS as error:
        raise ConfigError(f"{path} is invalid: {_merge_error(cfg, error)}") from error
    for word in opts:
        if word.startswith("--"):
            raise ConfigError(f"{word} is invalid after the first override. Fix: put flags before KEY VALUE pairs.")
    for word in opts[::2]:
        if re.match(r"[A-Z][\w.]*=", word):
            raise ConfigError(f"{word} is invalid: expected KEY VALUE. Fix: {word.replace('=', ' ', 1)}.")
    if len(opts) % 2:
        raise ConfigError(f"Overrides are invalid: expected KEY VALUE pairs, got {len(opts)} words: {' '.join(opts)}.")
    for key in opts[::2]:
        if key.startswith("MODEL.HALONET.MIXER_OPTIONS.") and key.count(".") == 4:
            mixer, option = key.split(".")[3:]  # yacs requires that an overridden key exists
            cfg.MODEL.HALONET.MIXER_OPTIONS.setdefault(mixer, CfgNode()).setdefault(option, None)
        if key.rpartition(".")[0] in leaf_values(cfg):  # which yacs does not check
            raise ConfigError(_unknown_key(cfg, key))
    try:
        cfg.merge_from_list(list(opts))
    except _MERGE_ERRORS as error:
        raise ConfigError(f"An override is invalid: {_merge_error(cfg, error)}") from error
    check_types(cfg)
    if cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES:
        try:
            apply_pretrained_preprocessing(cfg)
        except (ImportError, ValueError) as error:
            name = cfg.MODEL.HALODET_TIMM.NAME
            raise ConfigError(f"MODEL.HALODET_TIMM.NAME={name} is invalid: {one_line(error)}") from error
    validate(cfg, train=train, extended=bool(add_configs))
    cfg.freeze()
    return cfg


def find_config(config_file: str) -> Path:
    """Return the path of a config file, given by its path or by its name inside halodet's configs.

    Raises:
        ConfigError: there is no such file.
    """
    if not config_file:
        raise ConfigError("No config was given. Fix: add --config-file, such as configs/mask_rcnn_halo_h4.yaml.")
    path = Path(config_file)
    own = config_dir() / (config_file if path.suffix else f"{config_file}.yaml")
    for candidate in (path, own):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise ConfigError(f"Config {config_file} is a folder. Fix: give a file, such as {path / 'config.yaml'}.")
    names = [str(p.relative_to(config_dir())) for p in sorted(config_dir().rglob("*.yaml")) if p.name[:4] != "Base"]
    near = difflib.get_close_matches(path.name, names, n=3) or names[:3]
    raise ConfigError(f"Config {config_file} not found, also not in {config_dir()}; similar: {', '.join(near)}.")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that rejects a key given twice, of which PyYAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.YAMLError(f"duplicate key {key.value} in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_yaml(path: str, parents: tuple[str, ...]) -> None:
    """Check that a config and its ``_BASE_`` files are plain YAML mappings with unique keys and without a cycle."""
    real = os.path.realpath(path)
    if real in parents:
        raise ConfigError(f"Circular _BASE_: {' -> '.join((*parents[parents.index(real) :], real))}.")
    try:
        with PathManager.open(path, "r", encoding="utf-8-sig") as file:
            content = yaml.load(file, Loader=_UniqueKeyLoader)
    except OSError as error:
        named = f", the _BASE_ of {parents[-1]}," if parents else ""
        raise ConfigError(f"{path}{named} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # dates are ValueErrors, keys TypeErrors
        fix = ". Fix: if you trust the file, add --allow-unsafe-config" if "python/" in str(error) else ""
        raise ConfigError(f"{path} is not a plain YAML config: {one_line(error)}{fix}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a config: expected a YAML mapping with keys such as MODEL and SOLVER.")
    bases = content.get(BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{path}: {BASE_KEY}={base!r} is invalid: expected the path of a config.")
        base = os.path.expanduser(base) if base.startswith("~") else base
        absolute = base.startswith(("/", "http://", "https://"))
        _check_yaml(base if absolute else os.path.join(os.path.dirname(path), base), (*parents, real))


def _merge_error(cfg: CfgNode, error: Exception) -> str:
    """Return yacs's message in a form that names the key, the value found and the value expected."""
    message = one_line(error)
    if "Non-existent" in message:
        return _unknown_key(cfg, message.split()[-1].strip("'\""))
    mismatch = _TYPE_MISMATCH.fullmatch(message)
    if not mismatch:
        return message
    expected, found, example, value, key = mismatch.groups()
    if expected.endswith("CfgNode"):
        known = next(name for name in leaf_values(cfg) if name.startswith(f"{key}."))
        return f"{key}={value} is invalid: expected keys such as {known}."
    return f"{key}={value} is invalid: expected type {expected} (such as {example}), got {found}."


def _unknown_key(cfg: CfgNode, key: str) -> str:
    known = {name.casefold(): name for name in leaf_values(cfg)}
    above, _, last = key.rpartition(".")
    renamed = f"{above}.{_RENAMED_KEYS.get(last)}"
    if renamed in known.values():
        return f"{key} is an unknown config key: it was renamed. Fix: use {renamed}."
    near = [known[name] for name in difflib.get_close_matches(key.casefold(), known, n=3, cutoff=0.5)]
    return f"{key} is an unknown config key" + (f"; similar: {', '.join(near)}." if near else ".")
