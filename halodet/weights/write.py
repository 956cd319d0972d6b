"""Write weights, so that a file is either the whole new one or what was there before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .errors import WeightsError

SUFFIXES = (".safetensors", ".pth")


def write_weights(path: str | os.PathLike, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` to ``path``: ``.safetensors``, or ``.pth`` as ``{"model": tensors}``, with ``metadata`` beside them.

    Raises:
        WeightsError: another suffix, no folder to write to, or metadata that are not strings.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path} cannot be written: expected a name that ends with {' or '.join(SUFFIXES)}.")
    metadata = dict(metadata or {})
    wrong = next((key for key, value in metadata.items() if not isinstance(key, str) or not isinstance(value, str)), None)
    if wrong is not None:
        raise WeightsError(f"the metadata of {path} are to be strings, but {wrong!r} is {metadata[wrong]!r}.")
    # Tensors that share memory or are views of others are written out by themselves: safetensors takes no others, and in a .pth a view
    # would bring along all that it is a view of.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        # "format" is what other readers of the hub ask for.
        write_atomically(path, lambda file: safetensors.torch.save_file(tensors, file, metadata={"format": "pt"} | metadata))
    else:
        write_atomically(path, lambda file: torch.save({"model": tensors, **({"metadata": metadata} if metadata else {})}, file))


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Call ``write`` with the name of a temporary file beside ``path``, then put it in its place; on any failure ``path`` stays as it was.

    Raises:
        WeightsError: the folder is not there or takes no file.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error.strerror}).") from error
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
