"""Access to config values by their full key, and the form of an error about one of them."""

from __future__ import annotations

import functools
from operator import getitem
from typing import Any

from halodet.config.defaults import add_halodet_config
from halodet.errors import ConfigError

from detectron2.config import CfgNode, get_cfg


@functools.cache
def default_values() -> dict[str, Any]:
    """Return Detectron2's and halodet's keys with their default values."""
    cfg = get_cfg()
    add_halodet_config(cfg)
    return leaf_values(cfg)


def leaf_values(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return the value of each full key, such as ``MODEL.DEVICE``."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        key = f"{prefix}{key}"
        values.update(leaf_values(value, f"{key}.") if isinstance(value, CfgNode) else {key: value})
    return values


def get_value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a full key."""
    return functools.reduce(getitem, key.split("."), cfg)


def flatten(value: Any) -> list[Any]:
    """Return the elements of nested sequences; of another value than a sequence, the value itself."""
    if isinstance(value, (list, tuple)):
        return [element for item in value for element in flatten(item)]
    return [value]


def invalid(key: str, value: Any, expected: str) -> ConfigError:
    """Return the error for a value of a key."""
    return ConfigError(f"{key}={value} is invalid: expected {expected}.")
