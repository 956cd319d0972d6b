"""Atomic writes: a file is the complete new version or the previous one, also when the machine stops in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halodet.errors import ConfigError

__all__ = ["atomic_write", "check_writable", "remove_leftovers", "write_json"]

_TEMPORARY = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def atomic_write(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call ``write`` with the name of a temporary file, then rename that file to ``path``.

    The data reaches the disk before the rename, and the rename before this function returns. On any failure the
    previous version of ``path`` is unchanged. A process that is killed in between leaves a file that
    :func:`remove_leftovers` removes.

    Args:
        path: the file to write. Its folder must exist.
        write: function that writes the file whose name it is given.

    Raises:
        OSError: the file cannot be written; ``strerror`` holds the reason, and the free space on a full disk.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are readable by their owner only
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        reason = cause.strerror or str(cause)
        if cause.errno in _FULL:
            Path(temporary).unlink(missing_ok=True)  # do not count it as used
            reason += f"; {shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB are free"
        raise OSError(cause.errno, reason, str(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = None) -> None:
    """Write ``value`` as JSON with :func:`atomic_write`.

    Raises:
        OSError: the file cannot be written.
        TypeError: ``value`` cannot be represented in JSON.
    """
    text = json.dumps(value, indent=indent)
    atomic_write(path, lambda file: Path(file).write_text(text + "\n" * (indent is not None), encoding="utf-8"))


def remove_leftovers(folder: str | os.PathLike[str], pattern: str = "*") -> list[str]:
    """Remove the temporary files that killed processes left in ``folder``, and return their names.

    Args:
        folder: the folder of the files that :func:`atomic_write` wrote.
        pattern: glob pattern of the final names, such as ``model_*.pth``.
    """
    found = sorted(Path(folder).glob(f".{pattern}.*{_TEMPORARY}"))
    for path in found:
        path.unlink(missing_ok=True)
    return [path.name for path in found]


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind ``error``: PyTorch's writer raises another error when it closes a failed file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def check_writable(folder: str) -> None:
    """Create ``folder`` and check that files can be written to it.

    Raises:
        ConfigError: they cannot.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        probe = Path(folder) / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR={folder} is invalid: expected a writable folder ({error.strerror}). "
            "Fix: set another OUTPUT_DIR."
        ) from error
