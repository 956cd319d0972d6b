"""Masks of objects in little memory."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["PackedMasks"]


class PackedMasks:
    """(N, H, W) bool masks of which each is stored as bits of its bounding box.

    Indexing with a mask, slice or integer array returns the selected masks as an array.
    """

    def __init__(self, masks: np.ndarray) -> None:
        self._size = masks.shape[1:]
        self._packed = [_pack(mask) for mask in masks]

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, item: Any) -> np.ndarray:
        indices = np.arange(len(self))[item]
        masks = np.zeros((len(indices), *self._size), bool)
        for mask, index in zip(masks, indices.tolist(), strict=True):
            rows, columns, shape, bits = self._packed[index]
            mask[rows, columns] = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape)
        return masks


def _pack(mask: np.ndarray) -> tuple[slice, slice, tuple[int, ...], np.ndarray]:
    """Return the rows, columns and shape of the bounding box of a mask, and its bits."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, left = (int(found[0]) if len(found) else 0 for found in (rows, columns))
    bottom, right = (int(found[-1]) + 1 if len(found) else 0 for found in (rows, columns))
    crop = mask[top:bottom, left:right]
    return slice(top, bottom), slice(left, right), crop.shape, np.packbits(crop)
