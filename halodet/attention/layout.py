"""Block layout: the sizes of one halo attention call, shared by all backends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockLayout:
    """Partition of a feature map into square blocks, each with a larger window of keys around it. Sizes in pixels.

    Args:
        height: height of the key and value maps.
        width: width of the key and value maps.
        block: side length of a block.
        top: halo above a block.
        bottom: halo below a block.
        left: halo to the left of a block.
        right: halo to the right of a block.
        stride: distance between neighboring queries.
        mask: whether keys outside the map are excluded from the softmax; otherwise they are zeros that take part in it.
        scale: factor on the product of query and key.
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
        """Number of block rows."""
        return _ceil_div(self.height, self.block)

    @property
    def columns(self) -> int:
        """Number of block columns."""
        return _ceil_div(self.width, self.block)

    @property
    def queries(self) -> int:
        """Number of queries along the side of a block."""
        return self.block // self.stride

    @property
    def query_height(self) -> int:
        """Height of the query map and of the output."""
        return _ceil_div(self.height, self.stride)

    @property
    def query_width(self) -> int:
        """Width of the query map and of the output."""
        return _ceil_div(self.width, self.stride)

    @property
    def window_height(self) -> int:
        """Height of the window of a block."""
        return self.top + self.block + self.bottom

    @property
    def window_width(self) -> int:
        """Width of the window of a block."""
        return self.left + self.block + self.right


def _ceil_div(size: int, divisor: int) -> int:
    """Divide and round up, in the form PyTorch uses for strided convolutions: sizes may be symbolic in a graph."""
    return (size - 1) // divisor + 1
