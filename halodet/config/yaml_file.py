"""Look through a YAML config and the files it is based on before anything is made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

MAX_VALUES = 100_000  # Detectron2's whole config has some hundreds
_MERGED = "tag:yaml.org,2002:merge"


def check_config_files(path: str | Path) -> None:
    """Check that a config, and what it names under ``_BASE_``, can be read without harm: PyYAML itself has no bounds.

    Aliases that stand for more than ``MAX_VALUES`` values take all memory when they are copied, a config that is its own base never ends,
    and of a key given twice PyYAML would silently take the later one, with all that stands below it.

    Raises:
        ValueError: one of the files is such a one, or no config; the message is one sentence that names the file.
    """
    _check(str(path), ())


def _check(path: str, above: Sequence[str]) -> None:
    here = os.path.realpath(path)
    if here in above:
        raise ValueError(
            f"{path} is based on itself, by way of {' and '.join(above[above.index(here) :])}: take one _BASE_ out"
        )
    try:
        text = Path(PathManager.get_local_path(path)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a plain YAML config: byte {error.start} is no UTF-8 text") from error
    except OSError as error:
        asked = f", which {above[-1]} names under _BASE_," if above else ""
        raise ValueError(f"{path}{asked} cannot be read ({error.strerror or error})") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _check_node(root, {}, ())
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a plain YAML config: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a plain YAML config: it is nested too deeply") from error
    except ValueError as error:  # of this file, or a date such as 2024-99-99
        raise ValueError(f"{path} cannot be used: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no config: expected YAML with keys like MODEL and SOLVER")
    for base in _bases(content, path):
        _check(base, (*above, here))


def _bases(content: dict[str, Any], path: str) -> Iterator[str]:
    """The files under ``_BASE_``, found where fvcore looks for them."""
    bases = content.get(BASE_KEY, [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base:
            raise ValueError(f"{path} has {base!r} under {BASE_KEY}, expected the path of a config")
        base = os.path.expanduser(base) if base.startswith("~") else base
        yield base if base.startswith(("/", "http://", "https://")) else os.path.join(os.path.dirname(path), base)


def _check_node(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Values that ``node`` stands for, aliases counted as often as they are used."""
    if id(node) in above:
        raise ValueError(f"what is given at line {node.start_mark.line + 1} contains itself")
    if id(node) not in sizes:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ValueError(f"a key at line {key.start_mark.line + 1} is no text")
                if key.tag != _MERGED:
                    if key.value in seen:
                        raise ValueError(
                            f"the key {key.value} is given again at line {key.start_mark.line + 1}: keep one of the two"
                        )
                    seen.add(key.value)
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        sizes[id(node)] = 1 + sum(_check_node(part, sizes, (*above, id(node))) for part in parts)
        if sizes[id(node)] > MAX_VALUES:
            raise ValueError(f"with its aliases written out it has more than {MAX_VALUES} values")
    return sizes[id(node)]
