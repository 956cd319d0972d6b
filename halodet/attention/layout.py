"""The sizes of one call of halo attention, worked out once for every backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockLayout:
    """A map of ``height`` × ``width`` pixels cut into blocks, each with a window that reaches beyond it by a halo.

    Args:
        height: of the maps of keys and values, in pixels.
        width: the same across.
        block: pixels along a side of a block.
        top: pixels of halo above a block; ``bottom``, ``left`` and ``right`` likewise.
        stride: pixels from one query to the next.
        mask: whether keys outside the map are left out of the softmax; otherwise they are zeros in it.
        scale: factor on q·k.
    """

    height: int
    width: int
    block: int
    top: int
    bottom: int
    left: int
    right: int
    stride: int
    mask: bool
    scale: float

    @property
    def rows(self) -> int:
        """Rows of blocks."""
        return _divide(self.height, self.block)

    @property
    def columns(self) -> int:
        """Columns of blocks."""
        return _divide(self.width, self.block)

    @property
    def queries(self) -> int:
        """Queries along a side of a block."""
        return self.block // self.stride

    @property
    def query_height(self) -> int:
        """Of the map of queries, and of the result."""
        return _divide(self.height, self.stride)

    @property
    def query_width(self) -> int:
        """The same across."""
        return _divide(self.width, self.stride)

    @property
    def window_height(self) -> int:
        """Pixels of a window from top to bottom."""
        return self.top + self.block + self.bottom

    @property
    def window_width(self) -> int:
        """Pixels of a window from left to right."""
        return self.left + self.block + self.right


def _divide(size: int, by: int) -> int:
    """Rounded up, in the form in which PyTorch itself writes the size of a strided convolution: sizes may be symbols in a graph."""
    return (size - 1) // by + 1
