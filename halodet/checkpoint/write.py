"""Write weights, so that a file is either the whole new one or what was there before, also when the machine stops in between."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halodet.errors import CheckpointError, CheckpointWriteError

import safetensors.torch
import torch
from torch import Tensor

SUFFIXES = (".safetensors", ".pth")
_TEMPORARY = ".part"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_weights(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to ``path``: ``.safetensors``, or ``.pth`` as ``{"model": tensors}``, with ``metadata`` beside them.

    Raises:
        CheckpointError: another suffix, no folder to write to, or metadata that are not strings.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} cannot be written: expected a name that ends with {' or '.join(SUFFIXES)}.")
    metadata = dict(metadata or {})
    wrong = next(
        (key for key, value in metadata.items() if not isinstance(key, str) or not isinstance(value, str)), None
    )
    if wrong is not None:
        raise CheckpointError(f"the metadata of {path} are to be strings, but {wrong!r} is {metadata[wrong]!r}.")
    # Tensors that share memory or are views of others are written out by themselves: safetensors takes no others, and in a .pth a view
    # would bring along all that it is a view of.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        # "format" is what other readers of the hub ask for.
        atomic_write(
            path, lambda file: safetensors.torch.save_file(tensors, file, metadata={"format": "pt"} | metadata)
        )
    else:
        atomic_write(
            path, lambda file: save_torch({"model": tensors, **({"metadata": metadata} if metadata else {})}, file)
        )


def save_torch(data: Any, file: str) -> None:
    """``torch.save`` through a file of Python's, whose errors say what is wrong; those of PyTorch's own writer do not."""
    with open(file, "wb") as opened:
        torch.save(data, opened)


def atomic_write(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Call ``write`` with the name of a temporary file beside ``path``, then put it in its place; on any failure ``path`` stays as it was.

    The file reaches the disk before it gets its name, and the name before this returns. A process that is killed in between leaves a
    file that :func:`remove_leftovers` removes.

    Raises:
        CheckpointWriteError: the folder is not there, takes no file, or has no room for this one.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
        os.close(handle)
    except OSError as error:
        raise CheckpointWriteError(f"{path} cannot be written ({error.strerror}).") from error
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        Path(temporary).unlink(missing_ok=True)  # to tell what is free without it
        free = f"; {shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB are free" if cause.errno in _FULL else ""
        raise CheckpointWriteError(f"{path} cannot be written ({cause.strerror or cause}{free}).") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike, pattern: str = "*") -> list[str]:
    """Remove temporary files of :func:`atomic_write` in ``folder`` whose final names match ``pattern``; returns their names."""
    found = sorted(Path(folder).glob(f".{pattern}.*{_TEMPORARY}"))
    for path in found:
        path.unlink(missing_ok=True)
    return [path.name for path in found]


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened, and renaming is up to the system
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems without it, some of them on the network
            raise
    finally:
        os.close(handle)


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind ``error``: PyTorch's writer fails once more when it closes a file that could not be written."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
