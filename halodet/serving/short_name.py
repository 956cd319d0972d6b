"""Names of files that a file system takes."""

from __future__ import annotations

__all__ = ["short_name"]

_BYTES = 200  # file systems take 255, with the suffixes


def short_name(name: str) -> str:
    """Return the start of a name, in UTF-8 of at most 200 bytes, and at least one character."""
    return name.encode(errors="ignore")[:_BYTES].decode(errors="ignore") or "upload"
