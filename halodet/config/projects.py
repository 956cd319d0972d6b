"""Modules of a user's own project, which the tools import before they read the config (``--import``)."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from halodet.errors import ConfigError
from halodet.utils.project_arguments import add_project_arguments

from detectron2.config import CfgNode

__all__ = ["AddConfig", "add_project_arguments", "import_projects"]

AddConfig = Callable[[CfgNode], object]
_CONFIG_FUNCTION = re.compile(r"add_(\w+_)?config")


def import_projects(modules: Iterable[str]) -> list[AddConfig]:
    """Import modules by name or by the path of a .py file, and return their functions named ``add_*_config``.

    The folder of a file is added to ``sys.path``, so that other processes can import it too.

    Raises:
        ConfigError: a module cannot be imported; its own exception is the cause.
    """
    functions: dict[AddConfig, None] = {}
    for name in modules:
        path = Path(name)
        if path.suffix == ".py":
            folder, name = str(path.resolve().parent), path.stem
            if folder not in sys.path:
                sys.path.insert(0, folder)
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise ConfigError(f"--import {path} failed: {type(error).__name__}: {error}.") from error
        if path.suffix == ".py" and Path(module.__file__ or "").resolve() != path.resolve():
            raise ConfigError(f"--import {path} failed: {name} is {module.__file__}. Fix: give the file another name.")
        found = [value for key, value in vars(module).items() if _CONFIG_FUNCTION.fullmatch(key) and callable(value)]
        functions |= dict.fromkeys(f for f in found if not getattr(f, "__module__", "").startswith("halodet."))
    return list(functions)
