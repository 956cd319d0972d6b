"""The error of everything in this package."""

from __future__ import annotations


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one sentence."""


class WriteError(WeightsError):
    """A file that cannot be written; what stood there before is untouched."""

    exit_code = 74  # EX_IOERR of sysexits.h
