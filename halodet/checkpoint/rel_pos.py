"""Relative position tables of another block and halo size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halodet.models import VARIANTS

import torch
from torch import Tensor, nn

# Block and halo sizes of published weights: HaloNet's variants and timm's halo models.
KNOWN = sorted({(v.block_size, v.halo_size) for v in VARIANTS.values()} | {(8, 2), (8, 3), (7, 2)})


def rel_pos_tables(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the module that owns each relative position table, by name of the table in the state dict."""
    found = {}
    for name, module in modules.items():
        tables = getattr(module, "rel_pos_tables", ())
        if not tables and all(hasattr(module, part) for part in ("pos_embed", "block_size", "halo_size")):
            tables = ("pos_embed.height_rel", "pos_embed.width_rel")
        found |= {f"{name}.{table}" if name else table: module for table in tables}
    return found


def layout_of(owner: nn.Module) -> dict[str, int]:
    """Return the sizes that give the rows of a module's tables their meaning; empty if its tables cannot be resized."""
    if not (hasattr(owner, "block_size") and hasattr(owner, "halo_size")):
        return {}
    return {"block_size": owner.block_size, "halo_size": owner.halo_size}


def infer_layout(owner: nn.Module, rows: int, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the layout of a checkpoint's table with ``rows`` rows."""
    block, halo = block_and_halo(rows, (owner.block_size, owner.halo_size), metadata)
    return {"block_size": block, "halo_size": halo}


def resize(owner: nn.Module, table: Tensor, layout: Mapping[str, int]) -> Tensor:
    """Resize a checkpoint's table of the given layout to that of ``owner``."""
    return resize_table(table, (layout["block_size"], layout["halo_size"]), (owner.block_size, owner.halo_size))


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a table (2 * window - 1, d) from (block, halo) ``old`` to ``new`` so that every offset keeps its row.

    Row r of the table of ``window = block + 2 * halo`` belongs to a key r - (window - 1) - halo pixels after its query
    (see :mod:`halodet.attention.reference`). Only offsets from -(block - 1) - halo to block - 1 + halo occur. Offsets
    that do not occur in the old window take the nearest row that does.
    """
    (old_block, old_halo), (new_block, new_halo) = old, new
    old_window, new_window = old_block + 2 * old_halo, new_block + 2 * new_halo
    offsets = torch.arange(2 * new_window - 1) - (new_window - 1) - new_halo
    reach = old_block - 1 + old_halo
    return table[(offsets.clamp(-reach, reach) + (old_window - 1) + old_halo).to(table.device)]


def block_and_halo(rows: int, new: tuple[int, int], metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Infer block and halo of a table with ``rows`` rows, which determine only the window.

    The first of these that has this window: ``block_size`` and ``halo_size`` of ``metadata``; the model's (``new``); a
    known pair with the model's block; one with the model's halo; any known pair. Otherwise the model's halo and the
    block that fits it.
    """
    window = (rows + 1) // 2
    try:
        saved = [(int(metadata["block_size"]), int(metadata["halo_size"]))]
    except (KeyError, TypeError, ValueError):
        saved = []
    known = sorted(KNOWN, key=lambda pair: (pair[0] != new[0], pair[1] != new[1]))
    fitting = (pair for pair in (*saved, new, *known) if pair[0] + 2 * pair[1] == window)
    return next(fitting, (window - 2 * new[1], new[1]))
