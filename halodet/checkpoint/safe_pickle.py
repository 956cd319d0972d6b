"""Unpickling that runs no code of the file: only tensors, numpy arrays and scalars of numbers, plain containers and settings come out.

A pickle names what is to be called to rebuild an object. Here each name that checkpoints have a good reason to use is answered by a
stand-in of our own, also where the original is harmless: numpy's own ``dtype`` and ``ndarray``, for example, can be given a state that
makes plain bytes pointers to objects. Any other name is refused.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

from halodet.errors import HalodetError

import numpy as np
import torch


class UnsafePickleError(HalodetError):
    """The pickle does something that is not allowed; the message says what, after "a pickle that"."""


class _Dtype:
    """Stands in for numpy.dtype while unpickling: numbers, truth values and strings only."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSU]\d+", name):
            raise UnsafePickleError(f"holds a numpy array of type {name!r}, which may carry code")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        if any(field is not None for field in state[2:5]):
            raise UnsafePickleError("holds a numpy array of a structured type")
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray while unpickling."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise UnsafePickleError("holds a numpy array of unknown type")
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C").value


def _from_buffer(data: bytes | str, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote str
    array.value = np.frombuffer(data, dtype.value).reshape(shape, order=order).copy()
    return array


def _scalar(dtype: _Dtype, data: bytes | str) -> np.generic:
    return _from_buffer(data, dtype, (), "C").value[()]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UnsafePickleError(f"would call _codecs.encode to {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # as protocol 2 writes them


def _dict(*_: object) -> collections.OrderedDict:
    return collections.OrderedDict()


def _nothing(*_: object) -> None:
    return None


STAND_INS: dict[str, Callable] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: _Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
    "builtins.bytes": _no_bytes,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "_codecs.encode": _latin1,
    "collections.defaultdict": _dict,
    **{
        f"builtins.{factory}": _nothing for factory in ("int", "float", "str", "bool", "list", "dict")
    },  # of a defaultdict
    "collections.deque": lambda items=(), *_: list(items),
    # Settings of a training, kept as plain dicts.
    "yacs.config.CfgNode": _dict,
    "fvcore.common.config.CfgNode": _dict,
    "detectron2.config.config.CfgNode": _dict,
}
# These torch.load knows by itself, and the first of them it wants to be the very class.
PLAIN: dict[str, Callable] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": lambda items=(): dict(items),
}


def load_torch(path: str | os.PathLike) -> Any:
    """What torch.save wrote to ``path``, tensors on the CPU; :class:`UnsafePickleError` if it asks for more than the names above."""
    # Given a name, torch.load would go by its suffix.
    with open(path, "rb") as file, _allowed(_stand_ins(STAND_INS)):
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:  # PyTorch 2.4 raises the second
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked is None:
                # what is wrong stands at the end of much advice
                raise pickle.UnpicklingError(str(error).rpartition("WeightsUnpickler error:")[2].strip()) from error
            raise UnsafePickleError(f"would call {_spoken(asked[1])}") from error
    return _resolved(loaded, {})


def load_pickle(path: str | os.PathLike) -> Any:
    """What pickle.dump wrote to ``path``; :class:`UnsafePickleError` if it asks for more than the names above."""
    with open(path, "rb") as file:
        return _resolved(_Unpickler(file).load(), {})


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")  # as Detectron2 reads the files that Python 2 wrote
        # Fresh ones each time: a pickle can change attributes of a class that it is given.
        self._stand_ins = {f"{s.__module__}.{s.__qualname__}": s for s in _stand_ins(STAND_INS | PLAIN)}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self._stand_ins:
            raise UnsafePickleError(f"would call {_spoken(full)}")
        return self._stand_ins[full]


def _stand_ins(table: dict[str, Callable]) -> list[type]:
    """For each name a class of that name; calling it calls what the table holds. PyTorch wants names of classes, and reads them off."""

    def made(full: str, make: Callable) -> type:
        module, _, name = full.rpartition(".")
        body = {"__module__": module, "__qualname__": name, "__new__": lambda cls, *args: make(*args)}
        return type(name, (), body)

    return [made(full, make) for full, make in table.items()]


@contextlib.contextmanager
def _allowed(stand_ins: list[type]) -> Iterator[None]:
    # torch.serialization.safe_globals came with PyTorch 2.5.
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([*stand_ins, _Dtype, _Array, argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _resolved(value: Any, known: dict[int, Any]) -> Any:
    """``value`` with arrays in place of their stand-ins, in containers of any depth; each object once, however often it occurs."""
    if isinstance(value, _Array | _Dtype):
        return value.value
    if not isinstance(value, dict | list | tuple) or isinstance(value, torch.Size):
        return value
    if id(value) not in known:
        known[id(value)] = value
        if isinstance(value, dict):
            for key, item in value.items():  # the keys stay; a Counter's update() would add
                value[key] = _resolved(item, known)
        elif isinstance(value, list):
            value[:] = [_resolved(item, known) for item in value]
        else:
            known[id(value)] = tuple(_resolved(item, known) for item in value)
    return known[id(value)]


def _spoken(name: str) -> str:
    """``os.system`` for the ``posix.system`` that a pickle says."""
    return re.sub(r"[^\w.<>]", "?", re.sub(r"^(posix|nt)\.", "os.", name))[:100]
