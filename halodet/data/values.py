"""What the checks of a user's COCO json share: tests of single values, and how they are shown and refused."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

TOLERANCE = 1.0  # pixels: COCO's own boxes and polygons stick out of the image by rounding
Note = Callable[[str, str], None]  # takes what is wrong with an entry that is kept, and what was done about it

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


class InvalidAnnotation(Exception):
    """One entry cannot be used; the message says why."""


def is_int(value: Any) -> bool:
    """Whether it can be an id or a size; pycocotools keeps ids in doubles."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def is_number(value: Any) -> bool:
    """Whether it can be a coordinate: the bound also refuses NaN, infinity and integers too long for a double."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9


def show(value: Any) -> str:
    """The value as it stands in a message, cut if it is long."""
    return _short.repr(value)
