"""Find the image files of a json, and read their sizes."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from halodet.data.annotations import show

from PIL import Image

_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


class UnreadableImage(Exception):
    """An image file is missing or is no image; the message is the reason.

    Attributes:
        missing: whether there is no file of this name.
    """

    def __init__(self, reason: str, *, missing: bool) -> None:
        super().__init__(reason)
        self.missing = missing


class ImageFiles:
    """Image files of one folder.

    Args:
        folder: folder that file names are relative to.
        names: all file names of the json.
    """

    def __init__(self, folder: Path, names: Iterable[Any]) -> None:
        self.folder = folder
        self._given = names

    def measure(self, name: str) -> tuple[str, int, int, int]:
        """Return the name of a file in the folder, its width and height after EXIF rotation, and its EXIF orientation.

        A name that is not in the folder may have separators of Windows, another Unicode normal form, or another
        machine's folders before it.

        Raises:
            UnreadableImage: the file is missing, or is no image.
        """
        for found in self._spellings(name):
            try:
                return found, *read_image_size(os.path.join(self.folder, found))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
                not_image = isinstance(error, Image.UnidentifiedImageError)
                reason = "not an image" if not_image else " ".join(str(error).split()) or type(error).__name__
                reason = f"{show(name)} cannot be opened as an image ({reason})"
                raise UnreadableImage(reason, missing=False) from error
        raise UnreadableImage(f"{show(name)} is not in {self.folder}", missing=True)

    def _spellings(self, name: str) -> Iterator[str]:
        """Yield the names under which a file may be in the folder, the given one first."""
        yield name
        path = posixpath.normpath(name.replace("\\", "/"))
        for candidate in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
            if candidate != name:
                yield candidate
        base = unicodedata.normalize("NFC", path.partition("?")[0].rpartition("/")[2])
        if base in self._names and len(self._bases[base]) == 1:  # else it is the name of several images
            yield self._names[base]

    @cached_property
    def _bases(self) -> dict[str, set[str]]:
        """The names of the json, without differences of spelling, by their part after the last separator."""
        bases: dict[str, set[str]] = defaultdict(set)
        for name in self._given:
            if isinstance(name, str):
                path = unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")).partition("?")[0])
                bases[path.rpartition("/")[2]].add(path)
        return bases

    @cached_property
    def _names(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", name): name for name in os.listdir(self.folder)}


def read_image_size(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Return width and height after EXIF rotation, as Detectron2 reads them, and the orientation, from the header."""
    with Image.open(path) as image:
        width, height = image.size
        try:
            # The base class's method, as that of PNG decodes the whole image in search of late metadata.
            orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
        except Exception:  # Detectron2 ignores broken EXIF too
            orientation = None
    return (height, width, orientation) if orientation in _TURNED else (width, height, 1)
