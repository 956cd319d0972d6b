"""Copy-paste augmentation: paste objects of one image into another, with their masks and boxes."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances


def choose_objects(count: int) -> np.ndarray:
    """Draw a random non-empty subset of ``count`` objects from numpy's generator, as Detectron2's augmentations do."""
    return np.random.permutation(count)[: np.random.randint(1, count + 1)]


def paste_objects(
    image: torch.Tensor, instances: Instances, other_image: torch.Tensor, other: Instances, chosen: np.ndarray
) -> tuple[torch.Tensor, Instances]:
    """Paste objects of ``other_image`` into ``image`` at their own position, counted from the top left corner.

    Masks lose the pixels that pasted objects cover. Objects without a visible pixel are dropped. Boxes are recomputed
    from the masks.

    Args:
        image: (C, H, W); unchanged.
        instances: its objects: ``gt_boxes``, ``gt_classes`` and, unless it is empty, ``gt_masks`` as BitMasks.
        other_image: (C, H', W') of the same dtype.
        other: its objects, with BitMasks.
        chosen: indices into ``other``.

    Returns:
        The new image, and its objects: the previous ones, then the pasted ones.

    Source: Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021
    (without blurred edges, which made no difference there).
    """
    if len(chosen) == 0:
        return image, instances
    height, width = image.shape[-2:]
    pasted = _crop_or_pad(other.gt_masks.tensor[chosen], height, width)
    cover = pasted.any(dim=0)
    below = instances.gt_masks.tensor if instances.has("gt_masks") else pasted[:0]
    masks = BitMasks(torch.cat((below & ~cover, pasted)))
    result = Instances((height, width), gt_masks=masks, gt_boxes=masks.get_bounding_boxes())
    result.gt_classes = torch.cat((instances.gt_classes, other.gt_classes[chosen]))
    visible = result.gt_boxes.nonempty()
    if not visible.all():  # indexing copies all masks
        result = result[visible]
    return torch.where(cover, _crop_or_pad(other_image, height, width), image), result


def _crop_or_pad(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Crop maps (..., H, W) to the top left ``height`` x ``width`` pixels, or pad them with zeros to that size."""
    part = maps[..., :height, :width]
    fitted = maps.new_zeros((*maps.shape[:-2], height, width))
    fitted[..., : part.shape[-2], : part.shape[-1]] = part
    return fitted
