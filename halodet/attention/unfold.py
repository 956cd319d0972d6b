"""Halo attention over all blocks at once in plain PyTorch, for tracing, scripting, export and ``torch.compile``.

All accesses are by index, so one exported graph works for maps of any height and width.
"""

from halodet.attention.layout import BlockLayout
from halodet.utils.exporting import is_counting, is_exporting

import torch
import torch.nn.functional as F
from torch import Tensor


def halo_attention_unfold(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    layout: BlockLayout,
) -> Tensor:
    """Compute halo attention with all windows in memory; tensors as in :func:`halodet.attention.halo_attention`."""
    halo = [layout.top, layout.bottom, layout.left, layout.right]
    least = 2 if is_exporting() and extra_k is None and isinstance(layout.block, int) else 1
    training = torch.compiler.is_compiling() and not is_exporting() and torch.is_grad_enabled()
    add_terms = training or (torch.jit.is_tracing() and is_counting())
    return attend_windows(
        q, k, v, rel_h, rel_w, extra_k, extra_v, layout.height, layout.width, layout.block, halo, layout.stride,
        layout.mask, layout.scale, least, add_terms,
    )  # fmt: skip


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    height: int,
    width: int,
    block: int,
    halo: list[int],
    stride: int,
    mask: bool,
    scale: float,
    least: int = 1,
    add_terms: bool = False,
) -> Tensor:
    """Compute :func:`halo_attention_unfold` from the fields of its layout; TorchScript can compile this function.

    ``least`` is the minimum number of block rows and columns. With 2, the last block of a map with one is repeated:
    torch.export would bind the graph to one block, or to several. With ``add_terms``, the terms of the logits are
    added instead of taken from one product: fewer multiply-adds, and a faster backward pass under ``torch.compile``.
    """
    device, (top, bottom, left, right) = q.device, halo
    rows, columns = (height - 1) // block + 1, (width - 1) // block + 1
    if not torch.jit.is_scripting():
        if least > 1:
            rows, columns = torch.sym_max(rows, least), torch.sym_max(columns, least)
    query_height, query_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    side, window_height, window_width = block // stride, top + block + bottom, left + block + right
    # Map coordinates of each block's queries (blocks, queries) and window keys (blocks, window), per direction.
    query_y, key_y = block_positions(rows, height, block, side, top, window_height, device)
    query_x, key_x = block_positions(columns, width, block, side, left, window_width, device)
    inside_y, inside_x = (key_y >= 0) & (key_y < height), (key_x >= 0) & (key_x < width)

    # Queries outside the map read its edge and are cropped at the end. Keys and values outside it read zeros.
    queries = gather_blocks(q, query_y.clamp(max=query_height - 1), query_x.clamp(max=query_width - 1))
    key_y, key_x = torch.where(inside_y, key_y, height), torch.where(inside_x, key_x, width)
    keys = gather_blocks(F.pad(k, [0, 1, 0, 1]), key_y, key_x).flatten(-3, -2)
    values = gather_blocks(F.pad(v, [0, 1, 0, 1]), key_y, key_x).flatten(-3, -2)

    # Table rows of each query, indexed as in timm so that its weights load unchanged.
    i = torch.arange(side, device=device).unsqueeze(1)
    rows_h = window_height - 1 + torch.arange(window_height, device=device) - i  # (queries, window)
    rows_w = window_width - 1 + torch.arange(window_width, device=device) - i
    logits_h = torch.matmul(queries, rel_h[rows_h].transpose(1, 2))
    logits_w = torch.matmul(queries.transpose(-3, -2), rel_w[rows_w].transpose(1, 2)).transpose(-3, -2)

    outside = ~(inside_y[:, None, :, None] & inside_x[None, :, None, :]).flatten(2)
    if add_terms:
        content = torch.matmul(queries.flatten(-3, -2) * scale, keys.transpose(-1, -2))
        position = logits_h.unsqueeze(-1) + logits_w.unsqueeze(-2)
        scores = content + position.flatten(-2).flatten(-3, -2)
        if mask:
            scores = scores.masked_fill(outside.unsqueeze(-2), float("-inf"))
        if extra_k is not None:
            content = torch.matmul(queries.flatten(-3, -2) * scale, extra_k.transpose(-1, -2))
            scores = torch.cat((scores, content), -1)
    else:
        # One matrix product adds all terms: q·k, and the logits of the row and column of each key, selected by ones.
        # Sums of tensors of the size of the scores take longer, above all in the runtimes of exported models.
        row = torch.eye(window_height, dtype=q.dtype, device=device).repeat_interleave(window_width, 0)
        terms = torch.cat((row, torch.eye(window_width, dtype=q.dtype, device=device).repeat(window_height, 1)), 1)
        parts = [queries * scale, logits_h, logits_w]
        if mask:
            # A logit that makes the weight exactly 0 and that all types can represent.
            masked = outside.unsqueeze(-1).to(q.dtype) * -30000.0
            terms = torch.cat((terms.expand([rows, columns, -1, -1]), masked), -1)
            ones = torch.ones([1], dtype=q.dtype, device=device)
            parts.append(ones.expand([q.shape[0], q.shape[1], rows, columns, side, side, 1]))
        queries = torch.cat(parts, -1)
        keys = torch.cat((keys, terms.expand([q.shape[0], q.shape[1], rows, columns, -1, -1])), -1)
        if extra_k is not None:
            keys = torch.cat((keys, F.pad(extra_k, [0, keys.shape[-1] - extra_k.shape[-1]])), -2)
        scores = torch.matmul(queries.flatten(-3, -2), keys.transpose(-1, -2))
    if extra_v is not None:
        values = torch.cat((values, extra_v), -2)
    out = torch.matmul(scores.softmax(-1).to(values.dtype), values)
    out = out.reshape(q.shape[0], q.shape[1], rows, columns, side, side, v.shape[2])
    return crop_blocks(out, query_height, query_width)


def crop_blocks(out: Tensor, height: int, width: int) -> Tensor:
    """Order blocks (B, heads, rows, columns, h, w, d) as a map (B, heads, d, height, width) without their padding.

    Selects, because a slice would bind an exported graph to maps that the block size does (or does not) divide.
    """
    out = out.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    y, x = torch.arange(height, device=out.device), torch.arange(width, device=out.device)
    return out.index_select(2, y).index_select(3, x).permute(0, 1, 4, 2, 3)


def block_positions(
    count: int, size: int, block: int, queries: int, before: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the queries (count, queries) and keys (count, window) of blocks in one direction."""
    blocks = torch.arange(count, device=device).clamp(max=(size - 1) // block).unsqueeze(1)
    keys = blocks * block - before + torch.arange(window, device=device)
    return blocks * queries + torch.arange(queries, device=device), keys


def gather_blocks(x: Tensor, y: Tensor, x_positions: Tensor) -> Tensor:
    """Gather (B, heads, d, H, W) at rows (rows, h) and columns (columns, w) as (B, heads, rows, columns, h, w, d).

    Two selections of whole rows and pixels are faster than one with an index for both.
    """
    x = x.permute(0, 1, 3, 4, 2).index_select(2, y.flatten()).index_select(3, x_positions.flatten())
    size = [x.shape[0], x.shape[1], y.shape[0], y.shape[1], x_positions.shape[0], x_positions.shape[1], x.shape[4]]
    return x.reshape(size).transpose(3, 4)
