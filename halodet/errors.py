"""Errors that halodet raises on purpose: one message for the user, and the exit code of the process."""

from __future__ import annotations


class HalodetError(Exception):
    """Base class of all expected errors.

    Attributes:
        exit_code: exit code of a command-line tool that ends with this error.
    """

    exit_code = 2


class ConfigError(HalodetError, ValueError):
    """A config key, flag or override has an invalid value."""


class DatasetError(HalodetError, ValueError):
    """A dataset cannot be used."""


class ImageError(HalodetError, ValueError):
    """An image file cannot be read."""


class CheckpointError(HalodetError, ValueError):
    """A checkpoint cannot be read or does not fit the model."""


class CheckpointWriteError(CheckpointError):
    """A file cannot be written; the previous version of the file is unchanged."""

    exit_code = 74  # EX_IOERR of sysexits.h


class TrainingStopped(HalodetError, RuntimeError):
    """Training cannot continue."""

    exit_code = 1
