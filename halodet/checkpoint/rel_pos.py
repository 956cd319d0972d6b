"""Relative position tables for another block or halo."""

from __future__ import annotations

import re
from collections.abc import Mapping

from halodet.models import VARIANTS

import torch
from torch import Tensor

TABLE = re.compile(r"\.pos_embed\.(height|width)_rel$")
# Block and halo of the attention that weights exist for: ours, and timm's halo models.
KNOWN = sorted({(v.block_size, v.halo_size) for v in VARIANTS.values()} | {(8, 2), (8, 3), (7, 2)})


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A relative table (2 * window - 1, d) for another block and halo: every offset keeps its row.

    A window reaches from ``halo`` pixels before its block to ``halo`` pixels behind it, so row r of the table for ``window = block +
    2 * halo`` belongs to a key r - (window - 1) - halo pixels behind its query (see :mod:`halodet.attention.reference`), and only the
    offsets from -(block - 1) - halo to block - 1 + halo are ever read. An offset that the old table never reads has learned nothing: it
    takes the nearest row that was.

    Args:
        table: of the file.
        old: its block and halo, in pixels.
        new: the model's.
    """
    (old_block, old_halo), (new_block, new_halo) = old, new
    old_window, new_window = old_block + 2 * old_halo, new_block + 2 * new_halo
    offsets = torch.arange(2 * new_window - 1) - (new_window - 1) - new_halo
    reach = old_block - 1 + old_halo
    return table[(offsets.clamp(-reach, reach) + (old_window - 1) + old_halo).to(table.device)]


def block_and_halo(rows: int, new: tuple[int, int], metadata: Mapping[str, object]) -> tuple[int, int]:
    """Block and halo that a table of ``rows`` rows was made for.

    A table's length gives the window alone. Where the file's ``metadata`` has no ``block_size`` and ``halo_size`` beside it, a table as
    long as the model's is taken for one of the same block and halo; of another length, for the one among the known pairs of that window
    that shares the block with the model, or else the halo, then for any known pair, and then for one with the model's halo.
    """
    window = (rows + 1) // 2
    try:
        said = int(metadata["block_size"]), int(metadata["halo_size"])
    except (KeyError, TypeError, ValueError):
        said = None
    if said and said[0] + 2 * said[1] == window:
        return said
    if window == new[0] + 2 * new[1]:
        return new
    pairs = [pair for pair in KNOWN if pair[0] + 2 * pair[1] == window]
    alike = [pair for pair in pairs if pair[0] == new[0]] + [pair for pair in pairs if pair[1] == new[1]]
    return (alike or pairs or [(window - 2 * new[1], new[1])])[0]
