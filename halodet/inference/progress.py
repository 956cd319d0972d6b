"""Progress bar of the tools."""

from __future__ import annotations

import sys

from tqdm import tqdm

__all__ = ["progress_bar"]

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_LOG_SECONDS = 10.0  # between the lines of a bar in a file


def progress_bar(total: int | None, unit: str, *, disable: bool = False) -> tqdm:
    """Return a bar on stderr with the rate and the time left.

    Args:
        total: number of steps; None if it is unknown.
        unit: what is counted, in the plural.
        disable: whether to show nothing.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    bar_format = None if total is None else _FORMAT
    seconds = 0.1 if is_terminal else _LOG_SECONDS
    return tqdm(total=total, unit=f" {unit}", bar_format=bar_format, mininterval=seconds, disable=disable)
