"""Example images of the page."""

from __future__ import annotations

import shutil
from pathlib import Path

from halodet.errors import ConfigError
from halodet.inference.demo import find_images
from halodet.utils.shape_scenes import draw_scene

import numpy as np
from PIL import Image

__all__ = ["copy_examples", "draw_examples"]

_SEED = 7
_MAX_EXAMPLES = 12


def draw_examples(folder: Path, count: int = 4) -> list[Path]:
    """Draw scenes of simple shapes into a folder, and return their files."""
    files = []
    for index in range(count):
        pixels = draw_scene(np.random.default_rng((_SEED, index)), 0).image
        files.append(folder / f"shapes_{index + 1}.png")
        Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).save(files[-1])
    return files


def copy_examples(folder: str, target: Path) -> list[Path]:
    """Copy the first images of a folder into another one, from which Gradio may serve files, and return the copies.

    Raises:
        ConfigError: the folder has no image, or cannot be read.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"--examples {folder} is invalid: expected a folder with images.")
    try:
        files = find_images([folder])[:_MAX_EXAMPLES]
    except ConfigError as error:
        raise ConfigError(f"--examples {folder} is invalid: it has no image.") from error
    copies = []
    for index, file in enumerate(files):  # in folders of their own, since names may occur twice
        copies.append(target / str(index) / Path(file).name)
        copies[-1].parent.mkdir()
        try:
            shutil.copyfile(file, copies[-1])
        except OSError as error:
            raise ConfigError(f"--examples {folder} is invalid: {file} cannot be read ({error.strerror}).") from error
    return copies
