"""What values of a pixel a network was trained on, and its first convolution for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Order, mean and standard deviation of the channels that a network takes, of pixels from 0 to 255.

    Args:
        order: ``"RGB"`` or ``"BGR"``.
        mean: taken off, by channel in that order.
        std: divided by, by channel in that order.
    """

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def metadata(self) -> dict[str, str]:
        """As entries to be saved beside weights; :func:`preprocessing_of` reads them."""
        mean, std = (" ".join(f"{value:.10g}" for value in values) for values in (self.mean, self.std))
        return {"input_format": self.order, "pixel_mean": mean, "pixel_std": std}

    def __str__(self) -> str:
        return f"{self.order} over {', '.join(f'{value:g}' for value in self.std)}"


# As Detectron2 documents them beside its models, and as torchvision and timm train.
TORCHVISION = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
MSRA = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


def adapt_stem(weight: Tensor, old: Preprocessing, new: Preprocessing) -> Tensor:
    """A first convolution (out, 3, k, k), trained on ``old`` pixels, that gives the same on ``new`` ones where their means agree."""
    colours = [old.order.index(colour) for colour in new.order]
    factor = torch.tensor([new.std[i] / old.std[colour] for i, colour in enumerate(colours)], dtype=torch.float64)
    return (weight[:, colours].double() * factor.view(1, 3, 1, 1).to(weight.device)).to(weight.dtype)


def same_mean(old: Preprocessing, new: Preprocessing) -> bool:
    """Whether the two take the same off every colour, to a hundredth of a grey level."""
    return all(abs(old.mean[old.order.index(colour)] - new.mean[i]) < 0.01 for i, colour in enumerate(new.order))


def preprocessing_of(checkpoint: Mapping[str, Any], style: str, names: set[str]) -> Preprocessing | None:
    """What a file of backbone weights was trained on, where it says so or its kind tells."""
    metadata = checkpoint.get("metadata") or {}
    try:
        if "pixel_std" in metadata:
            mean, std = (tuple(map(float, metadata[key].split())) for key in ("pixel_mean", "pixel_std"))
            if len(mean) == len(std) == 3 and sorted(metadata["input_format"]) == sorted("RGB"):
                return Preprocessing(metadata["input_format"], mean, std)
        given = vars(checkpoint["args"]) if hasattr(checkpoint.get("args"), "__dict__") else {}
        if given.get("mean") and given.get("std"):  # of timm's training script, where not its default
            metadata = given
        if "std" in metadata:  # timm's, of pixels from 0 to 1
            mean, std = (tuple(round(255 * float(value), 4) for value in metadata[key]) for key in ("mean", "std"))
            if len(mean) == len(std) == 3:
                return Preprocessing("RGB", mean, std)
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # of another program: the kind of file tells then
    author = checkpoint.get("__author__")
    if author == "Caffe2":
        return MSRA
    # HaloNet's classifier form is trained by timm's script, with timm's own constants.
    if author == "torchvision" or style.startswith("torchvision") or "head.linear.weight" in names:
        return TORCHVISION
    return None
