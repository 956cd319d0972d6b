"""Input preprocessing that a network was trained with, and the adaptation of its first convolution to another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Channel order, mean and standard deviation of a network's input.

    Args:
        order: ``"RGB"`` or ``"BGR"``.
        mean: mean by channel in that order, of pixels from 0 to 255.
        std: standard deviation by channel in that order, of pixels from 0 to 255.
    """

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def metadata(self) -> dict[str, str]:
        """Return metadata of a checkpoint; :func:`preprocessing_of` reads it."""
        mean, std = (" ".join(f"{value:.10g}" for value in values) for values in (self.mean, self.std))
        return {"input_format": self.order, "pixel_mean": mean, "pixel_std": std}

    def __str__(self) -> str:
        return f"{self.order} with std {', '.join(f'{value:g}' for value in self.std)}"


# As Detectron2 documents them for its models, and as torchvision and timm train.
TORCHVISION = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
MSRA = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


def adapt_stem(weight: Tensor, old: Preprocessing, new: Preprocessing) -> Tensor:
    """Adapt a first convolution (out, 3, k, k) so that it gives the same output on ``new`` input, where the means
    agree."""
    channels = [old.order.index(channel) for channel in new.order]
    factor = torch.tensor([new.std[i] / old.std[channel] for i, channel in enumerate(channels)], dtype=torch.float64)
    return (weight[:, channels].double() * factor.view(1, 3, 1, 1).to(weight.device)).to(weight.dtype)


def same_mean(old: Preprocessing, new: Preprocessing) -> bool:
    """Return whether the means of each color differ by less than 0.01."""
    return all(abs(old.mean[old.order.index(channel)] - new.mean[i]) < 0.01 for i, channel in enumerate(new.order))


def preprocessing_of(checkpoint: Mapping[str, Any], key_mapping: str, names: set[str]) -> Preprocessing | None:
    """Return the preprocessing that a checkpoint names or that follows from its kind; None if unknown."""
    metadata = checkpoint.get("metadata") or {}
    try:
        if "pixel_std" in metadata:
            mean, std = (tuple(map(float, metadata[key].split())) for key in ("pixel_mean", "pixel_std"))
            if len(mean) == len(std) == 3 and sorted(metadata["input_format"]) == sorted("RGB"):
                return Preprocessing(metadata["input_format"], mean, std)
        args = vars(checkpoint["args"]) if hasattr(checkpoint.get("args"), "__dict__") else {}
        if args.get("mean") and args.get("std"):  # timm's training script, where they are not its defaults
            metadata = args
        if "std" in metadata:  # timm's, of pixels from 0 to 1
            mean, std = (tuple(round(255 * float(value), 4) for value in metadata[key]) for key in ("mean", "std"))
            if len(mean) == len(std) == 3:
                return Preprocessing("RGB", mean, std)
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # metadata of another program
    author = checkpoint.get("__author__")
    if author == "Caffe2":
        return MSRA
    # HaloNet classifiers are trained by timm's script, with timm's constants.
    if author == "torchvision" or key_mapping.startswith("torchvision") or "head.linear.weight" in names:
        return TORCHVISION
    return None
