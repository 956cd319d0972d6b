"""Read a checkpoint of any kind, tensors only: nothing that a file brings along is run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halodet.checkpoint.safe_pickle import UnsafePickleError, load_pickle, load_torch
from halodet.errors import CheckpointError, CheckpointWriteError
from halodet.utils.io import atomic_write

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

# Where programs put the state dict; timm's averaged weights go before the ones they average, as in timm.
SUFFIXES = (".safetensors", ".pth")
WRAPPERS = ("model", "state_dict_ema", "state_dict", "model_ema", "model_state")
_LEGACY_TORCH = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save pickled first, before PyTorch 1.6
)

logger = logging.getLogger(__name__)


def read_checkpoint(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """A checkpoint of Detectron2, timm, torchvision, pycls or halodet: ``{"model": flat dict of CPU tensors, named as in the file, ...}``.

    What kind a file is, is read from the file: safetensors, ``torch.save``'s zip and its older form, or a pickle of numpy arrays. The
    state dict is taken out of its wrapper (``model``, ``state_dict_ema``, ``state_dict``, ``model_ema``, ``model_state``, or none); the
    file's other entries stand beside it. As in Detectron2, a ``.pkl`` without an author is Caffe2's (``__author__``,
    ``matching_heuristics``; momentum left out) and a ``.pyth`` is pycls's. Entries of the state dict that are no tensors are left out,
    with a line in the log.

    Args:
        path: of a local file.
        allow_pickle: run what a pickle asks for. Only for files whose origin you trust.

    Raises:
        CheckpointError: no such file, or truncated, damaged, no checkpoint, without tensors, or asking for more than tensors.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        raise CheckpointError(f"{path} {kind}, expected a file of weights.")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        size = os.path.getsize(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes), expected a file of weights: get it again.")
    if start.startswith(b"PK\x03\x04"):
        loaded = _read_torch_zip(path, size, allow_pickle)
    elif start.startswith(_LEGACY_TORCH):
        loaded = _read_torch_legacy(path, size, allow_pickle)
    elif start[4:9] == b"\0\0\0\0{":  # a length of eight bytes, then json
        loaded = _read_safetensors(path, size, start)
    elif start.startswith(b"\x80") or path.endswith(".pkl"):
        loaded = _read_pickle(path, size, start, allow_pickle)
    else:
        raise CheckpointError(_no_checkpoint(path, size, start))
    return _unwrapped(path, loaded)


def _read_safetensors(path: str, size: int, start: bytes) -> dict[str, Any]:
    try:
        (length,) = struct.unpack("<Q", start[:8])
        with open(path, "rb") as file:
            file.seek(8)
            header = json.loads(file.read(length)) if 8 + length <= size else None
        needed = (
            8 + length + max([0, *(e["data_offsets"][1] for k, e in (header or {}).items() if k != "__metadata__")])
        )
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise CheckpointError(_no_checkpoint(path, size, start)) from error
    if header is None or needed != size:
        raise CheckpointError(
            f"{path} is truncated or damaged: its header tells of {needed} bytes{' and more' if header is None else ''}, "
            f"it has {size}: get it again."
        )
    try:
        tensors = safetensors.torch.load_file(path, device="cpu")
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except Exception as error:  # its own error type, and KeyError for a dtype that PyTorch does not have
        raise CheckpointError(
            f"{path} of {size} bytes is a damaged safetensors file ({_reason(error)}): get it again."
        ) from error
    return {"model": tensors, **({"metadata": metadata} if metadata else {})}


def _read_torch_zip(path: str, size: int, allow_pickle: bool) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = next((entry.filename for entry in archive.infolist() if not _intact(archive, entry)), None)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: its {size} bytes begin like a checkpoint of torch.save, but the table at the end of it is "
            "not there: get it again."
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: in its {size} bytes the checksum of {damaged} does not hold: get it again."
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path} is a TorchScript program, not weights: save its state_dict() with torch.save.")
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip archive, but not one of torch.save: it holds {', '.join(names[:3]) or 'nothing'}."
        )
    return _read(path, size, "checkpoint of torch.save", _trusting_torch if allow_pickle else load_torch)


def _intact(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    # PyTorch does not look at the checksums. 0 is what it writes when told to write none.
    if entry.CRC == 0:
        return True
    try:
        with archive.open(entry) as file:
            while file.read(2**20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _read_torch_legacy(path: str, size: int, allow_pickle: bool) -> Any:
    # Before PyTorch 2.6 the reader of tar archives ran code even with weights_only.
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is a tar archive, not weights: unpack it.")
    return _read(path, size, "checkpoint of torch.save's older form", _trusting_torch if allow_pickle else load_torch)


def _read_pickle(path: str, size: int, start: bytes, allow_pickle: bool) -> Any:
    if not start.startswith(b"\x80") and start.lstrip()[:1] not in (
        b"(",
        b"}",
        b"c",
    ):  # what the oldest pickles begin with
        raise CheckpointError(_no_checkpoint(path, size, start))
    loaded = _read(path, size, "pickle", _trusting_pickle if allow_pickle else load_pickle)
    if (
        not isinstance(loaded, dict)
        or "__author__" in loaded
        or any(isinstance(loaded.get(name), dict) for name in WRAPPERS)
    ):
        return loaded
    blobs = loaded.get("blobs", loaded)
    blobs = (
        {name: value for name, value in blobs.items() if not str(name).endswith("_momentum")}
        if isinstance(blobs, dict)
        else blobs
    )
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def _read(path: str, size: int, kind: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(path)
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{path} is a {kind} that {error}, and only tensors, numpy arrays and plain containers are read: if you trust "
            "where it comes from, give --allow-pickle."
        ) from error
    except Exception as error:  # reading arbitrary bytes raises nearly anything
        raise CheckpointError(
            f"{path} is truncated or damaged: its {size} bytes begin like a {kind}, but cannot be read as one ({_reason(error)}): "
            "get it again."
        ) from error


def _trusting_torch(path: str) -> Any:
    with open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=False)


def _trusting_pickle(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


def _unwrapped(path: str, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors: save the model's state_dict()."
        )
    wrapper = next((name for name in WRAPPERS if isinstance(loaded.get(name), dict)), None)
    entries = {} if wrapper is None else {str(key): value for key, value in loaded.items() if key != wrapper}
    state_dict = loaded if wrapper is None else loaded[wrapper]
    if path.endswith(".pyth"):
        state_dict = {
            name: value for name, value in state_dict.items() if not str(name).endswith("num_batches_tracked")
        }
        entries |= {"__author__": "pycls", "matching_heuristics": True}
    tensors, others = {}, {}
    for name, value in state_dict.items():
        tensor = _tensor(value)
        if tensor is None:
            others[str(name)] = type(value).__name__
        else:
            tensors[str(name)] = tensor
    if not tensors:
        held = ", ".join(list(others)[:5])
        raise CheckpointError(f"{path} holds no tensors{f': its entries are {held}' if held else ''}.")
    if others:
        first = next(iter(others))
        logger.warning(
            "%s: %d of the state dict's %d entries are no tensors and left out, first %s (%s)",
            path,
            len(others),
            len(others) + len(tensors),
            first,
            others[first],
        )
    if wrapper is not None and wrapper != "model":
        logger.info("%s: the weights are its entry %s", path, wrapper)
    return {"model": tensors, **entries}


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return None if value.is_meta else value.detach()
    if not isinstance(value, np.ndarray | np.number | np.bool_):
        return None
    array = np.asarray(value)
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))
    except TypeError:  # strings, and numbers that PyTorch does not have
        return None


def _no_checkpoint(path: str, size: int, start: bytes) -> str:
    text = start.decode("utf-8", errors="ignore")
    if b"\0" not in start and text and sum(c.isprintable() or c.isspace() for c in text) >= 0.9 * len(start):
        kind = "a web page" if "<html" in text.lower() or "<!doctype" in text.lower() else "a text file"
        begins = f"beginning {' '.join(text.split())[:60]!r}"
    else:
        kind, begins = "no checkpoint", f"beginning with the bytes {start[:8].hex(' ')}"
    return f"{path} is {kind} of {size} bytes, {begins}, expected a .pth, .pkl or .safetensors file of weights: get it again."


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".")[:120] or type(error).__name__


def write_weights(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to a ``.safetensors`` file, or to a ``.pth`` file as ``{"model": tensors, "metadata": metadata}``.

    Raises:
        CheckpointError: the suffix is another one, or an entry of ``metadata`` is not a string.
        CheckpointWriteError: the file cannot be written; its previous version is unchanged.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} cannot be written: expected a suffix {' or '.join(SUFFIXES)}.")
    metadata = dict(metadata or {})
    wrong = next((key for key, value in metadata.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise CheckpointError(f"metadata of {path} is invalid: expected strings, got {wrong!r}: {metadata[wrong]!r}.")
    # safetensors takes no views or shared memory, and a view in a .pth file brings along the whole storage.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        header = {"format": "pt", **metadata}  # readers of the hub expect "format"
        write_file(path, lambda file: safetensors.torch.save_file(tensors, file, metadata=header))
    else:
        data = {"model": tensors, **({"metadata": metadata} if metadata else {})}
        write_file(path, lambda file: save_torch(data, file))


def save_torch(data: Any, file: str) -> None:
    """Call ``torch.save`` on an open file: Python's errors name the reason, those of PyTorch's own writer do not."""
    with open(file, "wb") as opened:
        torch.save(data, opened)


def write_file(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call :func:`halodet.utils.io.atomic_write`.

    Raises:
        CheckpointWriteError: the file cannot be written; its previous version is unchanged.
    """
    try:
        atomic_write(path, write)
    except OSError as error:
        raise CheckpointWriteError(f"{path} cannot be written ({error.strerror or error}).") from error
