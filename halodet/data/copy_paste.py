"""Copy-paste: objects of one image laid on another one, masks and boxes with them."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances


def choose_objects(count: int) -> np.ndarray:
    """A random subset of ``count`` objects, at least one of them, drawn from numpy's generator as Detectron2's augmentations are."""
    return np.random.permutation(count)[: np.random.randint(1, count + 1)]


def paste_objects(
    image: torch.Tensor, instances: Instances, other_image: torch.Tensor, other: Instances, chosen: np.ndarray
) -> tuple[torch.Tensor, Instances]:
    """Lay objects of ``other_image`` over ``image``, at their own place counted from the top left corner.

    Masks of what they cover lose those pixels, and what is hidden fully is dropped, as are chosen objects that lie outside ``image``.
    Boxes of the result are drawn around the masks' visible part.

    Args:
        image: (C, H, W); not changed.
        instances: its objects: gt_boxes, gt_classes and, unless there are none, gt_masks of the kind BitMasks.
        other_image: (C, H', W'), of the same type; sizes may differ.
        other: its objects, with BitMasks too.
        chosen: indices into ``other``.

    Returns:
        The new image, and its objects: first those that were there, then the pasted ones.

    Source: Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021 (without the
    blurred edges, which they found to make no difference).
    """
    if len(chosen) == 0:
        return image, instances
    height, width = image.shape[-2:]
    pasted = _fit(other.gt_masks.tensor[chosen], height, width)
    cover = pasted.any(dim=0)
    below = instances.gt_masks.tensor if instances.has("gt_masks") else pasted[:0]
    masks = BitMasks(torch.cat((below & ~cover, pasted)))
    result = Instances((height, width), gt_masks=masks, gt_boxes=masks.get_bounding_boxes())
    result.gt_classes = torch.cat((instances.gt_classes, other.gt_classes[chosen]))
    seen = result.gt_boxes.nonempty()
    if not seen.all():  # choosing copies all masks
        result = result[seen]
    return torch.where(cover, _fit(other_image, height, width), image), result


def _fit(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The maps' top left part of that size, with zeros where they end before."""
    part = maps[..., :height, :width]
    fitted = maps.new_zeros((*maps.shape[:-2], height, width))
    fitted[..., : part.shape[-2], : part.shape[-1]] = part
    return fitted
