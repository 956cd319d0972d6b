"""Writing a JSON file whole or not at all."""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = ["write_json"]


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON so that the file at ``path`` is never half written.

    Raises:
        OSError: the folder cannot be written to; a file that was there before is left as it was.
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
