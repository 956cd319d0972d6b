"""What torch.export needs so that one exported graph takes images of any size, and the mode that counts operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_counting = False


@contextmanager
def counting_operations() -> Iterator[None]:
    """Trace the multiply-adds of the definition, without those that make an exported model faster."""
    global _counting
    _counting = True
    try:
        yield
    finally:
        _counting = False


def is_counting() -> bool:
    """Return whether :func:`counting_operations` is active."""
    return _counting


# A constant, because some versions of PyTorch return True in all code that they trace.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return whether :func:`torch.export.export` is tracing the caller."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()


def channels_last(x: Tensor) -> Tensor:
    """Bring maps (B, C, H, W) to the channels-last format, except while exporting.

    Strides of that format depend on whether a map has more than one pixel, which would bind the graph to one case.
    """
    if not torch.jit.is_scripting():
        if is_exporting():
            return x
    return x.contiguous(memory_format=torch.channels_last)
