"""The fix that is added to errors raised while a dependency is imported."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

_COLLECT_ENV = "halodet: a dependency is missing or broken. Fix: run python -m halodet.utils.collect_env"
_NO_TORCH = "halodet: this needs PyTorch and Detectron2. Fix: pip install 'halodet[train]'"


@contextlib.contextmanager
def explain_import_errors() -> Iterator[None]:
    """Add the fix to an error raised while a dependency is imported (Python 3.11 or newer)."""
    try:
        yield
    except Exception as error:
        note = _COLLECT_ENV if is_installed("torch") else _NO_TORCH
        if hasattr(error, "add_note") and note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
