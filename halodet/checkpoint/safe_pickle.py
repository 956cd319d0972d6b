"""Unpickle tensors, numpy arrays and plain containers without running code of the file.

A pickle names the functions and classes that rebuild its objects. Only the names below are answered, most of them by
replacements: even numpy's own ``dtype`` and ``ndarray`` accept a state that makes plain bytes pointers to objects. Any
other name is an error.
"""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

from halodet.errors import HalodetError

import numpy as np
import torch


class UnsafePickleError(HalodetError):
    """The pickle asks for a function or type that is not allowed; the message completes "a pickle that"."""


class _Dtype:
    """Replacement of numpy.dtype: numbers, booleans and strings only."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSU]\d+", name):
            raise UnsafePickleError(f"holds a numpy array of type {name!r}, which may carry code")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        if any(field is not None for field in state[2:5]):
            raise UnsafePickleError("holds a numpy array of a structured type")
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """Replacement of numpy.ndarray, empty until it gets its state; it is pickled as a plain array."""

    def __new__(cls) -> _Array:
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, _checked(dtype), fortran, _bytes(data)))

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _checked(dtype: Any) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise UnsafePickleError("holds a numpy array of unknown type")
    return dtype.value


def _bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote str


def _from_buffer(data: bytes | str, dtype: Any, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(_bytes(data), _checked(dtype)).reshape(shape, order=order).copy()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UnsafePickleError(f"calls _codecs.encode to {encoding}")
    return text.encode("latin1")


def _allowed_names() -> dict[str, Callable]:
    """Return what answers each name. The functions are new ones each time, because a pickle can set attributes of a
    function."""
    names: dict[str, Callable] = {"numpy.dtype": lambda *args: _Dtype(*args), "numpy.ndarray": lambda: None}
    for core in ("core", "_core"):  # numpy 1 and 2
        names[f"numpy.{core}.multiarray._reconstruct"] = lambda *_: _Array()
        names[f"numpy.{core}.multiarray.scalar"] = lambda dtype, data: _from_buffer(data, dtype, (), "C")[()]
        names[f"numpy.{core}.numeric._frombuffer"] = lambda *args: _from_buffer(*args)
    names["builtins.bytes"] = lambda: b""  # protocol 2 writes empty bytes as a call
    names["builtins.frozenset"] = frozenset
    return names


def load_torch(path: str | os.PathLike[str]) -> Any:
    """Load a file of ``torch.save`` on the CPU.

    Raises:
        UnsafePickleError: the file asks for more than the allowed names.
        Exception: the file is damaged.
    """
    allowed = [(function, name) for name, function in _allowed_names().items()]
    # timm's training script saves its arguments as a Namespace.
    allowed += [_Dtype, _Array, (argparse.Namespace, "argparse.Namespace")]
    with open(path, "rb") as file, torch.serialization.safe_globals(allowed):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+)", str(error))
            if name is None:  # the reason comes after much advice
                raise pickle.UnpicklingError(str(error).rpartition("WeightsUnpickler error:")[2].strip()) from error
            raise UnsafePickleError(f"calls {_readable(name[1])}") from error


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Load a file of ``pickle.dump``; strings of Python 2 are decoded as latin1, as in Detectron2.

    Raises:
        UnsafePickleError: the file asks for more than the allowed names.
        Exception: the file is damaged.
    """
    with open(path, "rb") as file:
        return _Unpickler(file, encoding="latin1").load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names = _allowed_names() | {
            "builtins.set": set,
            "_codecs.encode": lambda *args: _latin1(*args),
            "collections.OrderedDict": collections.OrderedDict,
            "collections.Counter": lambda items=(): dict(items),
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self._names:
            raise UnsafePickleError(f"calls {_readable(full)}")
        return self._names[full]


def _readable(name: str) -> str:
    """Return ``os.system`` for a pickle's ``posix.system``."""
    return re.sub(r"[^\w.<>]", "?", re.sub(r"^(posix|nt)\.", "os.", name))[:100]
