"""Imports on first use, and the fix that is added to errors raised while a dependency is imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from halodet.errors import ConfigError

_COLLECT_ENV = "halodet: a dependency is missing or broken. Fix: run python -m halodet.utils.collect_env"
_INSTALL = "pip install 'halodet[train]', then python tools/install_detectron2.py"
_NO_TORCH = f"halodet: this needs PyTorch and Detectron2. Fix: {_INSTALL}"
_NO_LIBRARIES = (
    "halodet: OpenCV needs system libraries for its windows. Fix: pip uninstall opencv-python, then "
    "pip install opencv-python-headless"
)
_TRAINING = (
    "torch",
    "torchvision",
    "detectron2",
    "fvcore",
    "iopath",
    "pycocotools",
    "yaml",
    "omegaconf",
    "safetensors",
)


@contextlib.contextmanager
def explain_import_errors() -> Iterator[None]:
    """Add the fix to an error raised while a dependency is imported (Python 3.11 or newer)."""
    try:
        yield
    except Exception as error:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        is_missing = name in _TRAINING and name not in sys.modules and not is_installed(name)
        note = _NO_TORCH if is_missing else _COLLECT_ENV
        if "libGL" in str(error):  # in many containers
            note = _NO_LIBRARIES
        if hasattr(error, "add_note") and note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


@contextlib.contextmanager
def training_imports(what: str) -> Iterator[None]:
    """Convert an ImportError of PyTorch, Detectron2 or one of their dependencies to a ConfigError with the fix.

    Args:
        what: what needs them.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{what} needs PyTorch and Detectron2 ({error}). Fix: {_INSTALL}.") from error


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def lazy_names(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use (PEP 562).

    Args:
        namespace: ``globals()`` of the package.
        modules: module below ``halodet`` that has each name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        with explain_import_errors():
            namespace[name] = getattr(importlib.import_module(f"halodet.{modules[name]}"), name)
        return namespace[name]

    return get, lambda: sorted({*namespace, *modules})
