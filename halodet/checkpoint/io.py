"""Read and write checkpoint files; reading runs no code of the file."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from halodet.checkpoint.safe_pickle import UnsafePickleError, load_pickle, load_torch
from halodet.errors import CheckpointError, CheckpointWriteError
from halodet.utils.io import atomic_write

import numpy as np
import safetensors
import safetensors.torch
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

# Keys of the state dict in other programs' files. timm's averaged weights come before the others, as in timm.
WRAPPERS = ("model", "state_dict_ema", "state_dict", "model_ema", "model_state")
SUFFIXES = (".safetensors", ".pth")
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number before PyTorch 1.6
_AGAIN = "Fix: download or copy it again."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory, so that a run reads its file once.

    Attributes:
        path: local path of the file.
        checkpoint: content as :func:`read_checkpoint` returns it.
        latest: whether it is the one to resume from, which ``latest_checkpoint`` found.
    """

    path: str
    checkpoint: dict[str, Any]
    latest: bool = False


def read_weights(weights: str, *, allow_pickle: bool = False) -> LoadedCheckpoint:
    """Fetch and read ``weights``, a path or URL of Detectron2's PathManager, with or without
    ``?matching_heuristics=True``.

    Pass the result to :class:`~halodet.checkpoint.checkpointer.Checkpointer` or ``load_weights`` as ``preloaded``, so
    that the file is not read a second time.

    Raises:
        CheckpointError: the file cannot be fetched or read.
    """
    url = urlparse(weights)
    try:
        path = PathManager.get_local_path(url._replace(query="").geturl())
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"MODEL.WEIGHTS={weights} cannot be fetched ({reason}).") from error
    return LoadedCheckpoint(path, with_query(read_checkpoint(path, allow_pickle=allow_pickle), url.query, weights))


def with_query(checkpoint: dict[str, Any], query: str, file: str) -> dict[str, Any]:
    """Apply the query of a checkpoint's URL: Detectron2 has ``?matching_heuristics=True``.

    Raises:
        CheckpointError: the query is another one.
    """
    queries = parse_qs(query)
    if queries.pop("matching_heuristics", ["False"]) == ["True"]:
        checkpoint["matching_heuristics"] = True
    if queries:
        raise CheckpointError(f"{file} has query {', '.join(queries)}: expected only ?matching_heuristics=True.")
    return checkpoint


def read_checkpoint(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read a checkpoint of halodet, Detectron2, timm, torchvision or pycls.

    The content, not the suffix, determines the format: safetensors, both formats of ``torch.save``, or a pickle of
    numpy arrays. The state dict may be bare or in one of :data:`WRAPPERS`. As in Detectron2, a ``.pkl`` file without an
    author is Caffe2's (its momentum is dropped) and a ``.pyth`` file is pycls's. Entries of the state dict that are not
    tensors are skipped and logged.

    Args:
        path: path of a local file.
        allow_pickle: whether to run code that the file holds. Only for files that you trust.

    Returns:
        ``{"model": {name: CPU tensor}, ...}`` with the other entries of the file.

    Raises:
        CheckpointError: the file does not exist, is damaged, is not a checkpoint, has no tensors, or needs
            ``allow_pickle``.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        found = "is a folder" if os.path.isdir(path) else "does not exist"
        raise CheckpointError(f"{path} {found}: expected a checkpoint file.")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path)
        loaded = _load(path, "torch.save file", _torch_load_unsafe if allow_pickle else load_torch)
    elif start.startswith(_LEGACY_TORCH):
        loaded = _load(path, "legacy torch.save file", _torch_load_unsafe if allow_pickle else load_torch)
    elif start[4:9] == b"\0\0\0\0{":  # a length of eight bytes, then JSON
        loaded = _load(path, "safetensors file", _load_safetensors)
    elif start.startswith(b"\x80") or (path.endswith(".pkl") and start[:1] in (b"(", b"}", b"c")):  # protocol 0
        loaded = _label_caffe2(_load(path, "pickle", _pickle_load_unsafe if allow_pickle else load_pickle))
    else:
        raise CheckpointError(f"{path} {_describe(start)}: expected a .pth, .pkl or .safetensors checkpoint. {_AGAIN}")
    return _unwrap(path, loaded)


def _load(path: str, kind: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(path)
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{path} is a {kind} that {error}: expected tensors, numpy arrays and plain containers only. Fix: if you "
            "trust its source, add --allow-pickle."
        ) from error
    except Exception as error:  # damaged files raise nearly anything
        reason = (str(error).splitlines() or [""])[0].rstrip(".")[:120] or type(error).__name__
        raise CheckpointError(
            f"{path} is not a {kind}, or is truncated or damaged ({os.path.getsize(path)} bytes; {reason}). {_AGAIN}"
        ) from error


def _load_safetensors(path: str) -> dict[str, Any]:
    tensors = safetensors.torch.load_file(path, device="cpu")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return {"model": tensors, **({"metadata": metadata} if metadata else {})}


def _check_zip(path: str) -> None:
    """Check that a zip file is complete, because PyTorch ignores the checksums, and that it is one of
    ``torch.save``."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save writes 0 for no checksum.
            damaged = next(
                (entry.filename for entry in archive.infolist() if entry.CRC and not _intact(archive, entry)), None
            )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: its {os.path.getsize(path)} bytes are part of a torch.save file. {_AGAIN}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match. {_AGAIN}")


def _intact(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as file:
            while file.read(2**20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _torch_load_unsafe(path: str) -> Any:
    with open(path, "rb") as file:  # by path, PyTorch would go by the suffix
        return torch.load(file, map_location="cpu", weights_only=False)


def _pickle_load_unsafe(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


def _label_caffe2(loaded: Any) -> Any:
    wrapped = isinstance(loaded, dict) and any(isinstance(loaded.get(name), dict) for name in WRAPPERS)
    if not isinstance(loaded, dict) or "__author__" in loaded or wrapped:
        return loaded
    blobs = loaded.get("blobs", loaded)
    if isinstance(blobs, dict):
        blobs = {name: value for name, value in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def _unwrap(path: str, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}: expected a dict. Fix: save the state_dict().")
    wrapper = next((name for name in WRAPPERS if isinstance(loaded.get(name), dict)), None)
    entries = {} if wrapper is None else {str(key): value for key, value in loaded.items() if key != wrapper}
    state_dict = loaded if wrapper is None else loaded[wrapper]
    if path.endswith(".pyth"):
        state_dict = {name: v for name, v in state_dict.items() if not str(name).endswith("num_batches_tracked")}
        entries |= {"__author__": "pycls", "matching_heuristics": True}
    tensors = {str(name): tensor for name, value in state_dict.items() if (tensor := _tensor(value)) is not None}
    others = [f"{name} ({type(value).__name__})" for name, value in state_dict.items() if str(name) not in tensors]
    if not tensors:
        raise CheckpointError(f"{path} has no tensors{f', only {summarize(others)}' if others else ''}.")
    if others:
        logger.warning("Skipped %d entries of %s that are not tensors: %s", len(others), path, summarize(others))
    if wrapper not in (None, "model"):
        logger.info("Using the weights in entry %s of %s", wrapper, path)
    return {"model": tensors, **entries}


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return None if value.is_meta else value.detach()
    if not isinstance(value, np.ndarray | np.number | np.bool_):
        return None
    array = np.array(value)
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError:  # strings, and types that PyTorch does not have
        return None


def _describe(start: bytes) -> str:
    """Describe a file that is not a checkpoint by its first bytes."""
    if not start:
        return "is empty"
    text = start.decode("utf-8", errors="ignore")
    if b"\0" in start or not text or sum(c.isprintable() or c.isspace() for c in text) < 0.9 * len(start):
        return f"starts with the bytes {start[:8].hex(' ')}"
    kind = "a web page" if "<html" in text.lower() or "<!doctype" in text.lower() else "a text file"
    return f"is {kind} that starts with {' '.join(text.split())[:60]!r}"


def write_weights(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to a ``.safetensors`` file, or to a ``.pth`` file as ``{"model": tensors, "metadata":
    metadata}``.

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


def summarize(items: list[str], count: int = 3) -> str:
    """Join the first ``count`` items, and say how many more there are."""
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
