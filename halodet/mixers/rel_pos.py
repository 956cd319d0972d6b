"""Relative position tables of halo attention with another block and halo size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Block and halo sizes of published weights: HaloNet's variants and timm's halo models.
KNOWN = ((7, 2), (8, 2), (8, 3), (8, 4), (10, 3), (12, 2), (14, 2), (32, 3))


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a table (2 * window - 1, d_qk) from (block, halo) ``old`` to ``new`` so that every offset keeps its row.

    Row r of the table of ``window = block + 2 * halo`` belongs to a key r - (window - 1) - halo pixels after its query
    (see :mod:`halodet.attention.reference`). Only offsets from -(block - 1) - halo to block - 1 + halo occur. Offsets
    that do not occur in the old window take the nearest row that does.
    """
    (old_block, old_halo), (new_block, new_halo) = old, new
    old_window, new_window = old_block + 2 * old_halo, new_block + 2 * new_halo
    offsets = torch.arange(2 * new_window - 1) - (new_window - 1) - new_halo
    reach = old_block - 1 + old_halo
    return table[(offsets.clamp(-reach, reach) + (old_window - 1) + old_halo).to(table.device)]


def infer_block_and_halo(rows: int, own: tuple[int, int], metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Infer block and halo of a table with ``rows`` rows, which determine only the window.

    The result is the first of these that has this window: ``block_size`` and ``halo_size`` of ``metadata``; the mixer's
    ``own``; a known pair with its block; one with its halo; any known pair. If there is none, the halo is the mixer's.
    """
    window = (rows + 1) // 2
    try:
        saved = [(int(metadata["block_size"]), int(metadata["halo_size"]))]
    except (KeyError, TypeError, ValueError):
        saved = []
    known = sorted(KNOWN, key=lambda pair: (pair[0] != own[0], pair[1] != own[1]))
    fitting = (pair for pair in (*saved, own, *known) if pair[0] + 2 * pair[1] == window)
    return next(fitting, (window - 2 * own[1], own[1]))
