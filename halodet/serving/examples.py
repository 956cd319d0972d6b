"""Example images of the page."""

from __future__ import annotations

from pathlib import Path

from halodet.errors import ConfigError
from halodet.inference.demo import find_images
from halodet.utils.shape_scenes import draw_scene

import numpy as np
from PIL import Image

__all__ = ["draw_examples", "find_examples"]

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


def find_examples(folder: str) -> list[Path]:
    """Return the first images of a folder.

    Raises:
        ConfigError: the folder has no image.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"--examples {folder} is invalid: expected a folder with images.")
    try:
        return [Path(file) for file in find_images([folder])[:_MAX_EXAMPLES]]
    except ConfigError as error:
        raise ConfigError(f"--examples {folder} is invalid: it has no image.") from error
