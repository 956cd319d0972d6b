"""Read annotation files: COCO json, YOLO data.yaml and folders of Pascal VOC xml files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halodet.data.annotation_formats import recognize_file, recognize_json, recognize_json_lines
from halodet.data.annotations import show
from halodet.data.yolo_voc import is_yolo_or_voc, read_yolo_or_voc
from halodet.errors import DatasetError


def read_annotations(path: Path, image_dir: str | Path | None, split: str) -> tuple[dict[str, Any], Path, bool]:
    """Read a COCO json, YOLO data.yaml or folder of Pascal VOC xml files for :func:`halodet.data.coco.validate_coco`.

    Args:
        path: the file or folder.
        image_dir: folder that its file names are relative to; may be None for YOLO and VOC.
        split: split of a data.yaml, ``"train"`` or ``"val"``.

    Returns:
        COCO dict with lists of images, annotations and categories, whose entries may be invalid; the folder that its
        file names are relative to; and whether any program can read the file: it is json without a byte order mark and
        has only ASCII characters.

    Raises:
        DatasetError: the file is unreadable or has another format, or ``image_dir`` is not a folder.
    """
    if image_dir is not None and not Path(image_dir).is_dir():
        raise DatasetError(f"{image_dir} is not a folder. Fix: give the folder with the images of {path}.")
    if is_yolo_or_voc(path):
        return *read_yolo_or_voc(path, None if image_dir is None else Path(image_dir), split), False
    data, portable = _read_json(path)
    if image_dir is None:
        raise DatasetError(
            f"The images of {path} are missing. Fix: give the folder that its file names are relative to."
        )
    for key in ("images", "categories", "annotations"):
        data[key] = _list(data, key, path, required=key != "annotations")
    return data, Path(image_dir), portable


def _read_json(json_file: Path) -> tuple[dict[str, Any], bool]:
    """Return the contents of a json, and whether any program can read it."""
    if found := recognize_file(json_file):
        raise DatasetError(f"{json_file} {found}")
    try:
        content = json_file.read_bytes()
    except OSError as error:
        raise DatasetError(f"{json_file} cannot be read ({error.strerror or error}).") from error
    size = len(content)
    if not content[:1000].strip() and not content.strip():
        raise DatasetError(f"{json_file} is empty ({size} bytes).")
    try:
        text = content.decode("utf-8-sig")
        del content  # a large file is in memory once
        data = json.loads(text)
        portable = text.isascii() and len(text) == size
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{json_file} is not UTF-8 text (byte {error.start} of {size}). Fix: save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and (found := recognize_json_lines(error.doc, error.pos)):
            raise DatasetError(f"{json_file} {found}") from error
        at = f"line {error.lineno}, column {error.colno} of {size} bytes"
        raise DatasetError(f"{json_file} is not valid JSON or is truncated ({error.msg} at {at}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of nested lists
        raise DatasetError(f"{json_file} cannot be parsed ({error}).") from error
    if found := recognize_json(data):
        raise DatasetError(f"{json_file} {found}")
    if not isinstance(data, dict):
        raise DatasetError(
            f"{json_file} contains {show(data)}: expected an object with 'images', 'annotations' and 'categories'."
        )
    return data, portable


def _list(data: dict[str, Any], key: str, json_file: Path, required: bool) -> list[Any]:
    value = data.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list) or (required and not value):
        found = f"{key}={show(value)} is invalid" if key in data else f"{key!r} is missing"
        raise DatasetError(f"{json_file}: {found}: expected a list. Fix: export the file as COCO instances json.")
    return value
