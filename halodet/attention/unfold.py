"""Halo attention over all blocks at once in plain PyTorch, for tracing, scripting, export and ``torch.compile``.

All accesses are by index, so one exported graph works for maps of any height and width.
"""

from halodet.attention.layout import BlockLayout
from halodet.utils.exporting import is_exporting

import torch
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
    return attend_windows(
        q, k, v, rel_h, rel_w, extra_k, extra_v, layout.height, layout.width, layout.block, halo, layout.stride,
        layout.mask, layout.scale, least,
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
) -> Tensor:
    """Compute :func:`halo_attention_unfold` from the fields of its layout; TorchScript can compile this function.

    ``least`` is the minimum number of block rows and columns. With 2, the last block of a map with one is repeated:
    torch.export would bind the graph to one block, or to several.
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

    # Coordinates outside the map read its edge; those queries are cropped at the end, keys and values zeroed or masked.
    queries = gather_blocks(q, query_y.clamp(max=query_height - 1), query_x.clamp(max=query_width - 1))
    key_y, key_x = key_y.clamp(0, height - 1), key_x.clamp(0, width - 1)
    keys, values = gather_blocks(k, key_y, key_x), gather_blocks(v, key_y, key_x)
    if not mask:
        inside = (inside_y[:, None, :, None] & inside_x[None, :, None, :]).unsqueeze(-1)
        keys, values = keys * inside, values * inside

    # Table rows of each query, indexed as in timm so that its weights load unchanged.
    i = torch.arange(side, device=device).unsqueeze(1)
    rows_h = window_height - 1 + torch.arange(window_height, device=device) - i  # (queries, window)
    rows_w = window_width - 1 + torch.arange(window_width, device=device) - i
    logits_h = torch.einsum("bnyxijd,iwd->bnyxijw", [queries, rel_h[rows_h]])
    logits_w = torch.einsum("bnyxijd,jwd->bnyxijw", [queries, rel_w[rows_w]])
    if mask:
        # -inf in either term masks their sum. Every block has a pixel of the map, so no query loses all its keys.
        logits_h = logits_h.masked_fill(~inside_y[:, None, None, None, :], float("-inf"))
        logits_w = logits_w.masked_fill(~inside_x[:, None, None, :], float("-inf"))
    position = (logits_h.unsqueeze(-1) + logits_w.unsqueeze(-2)).flatten(-2).flatten(-3, -2)

    queries, keys, values = queries.flatten(-3, -2) * scale, keys.flatten(-3, -2), values.flatten(-3, -2)
    scores = torch.matmul(queries, keys.transpose(-1, -2)) + position
    if extra_k is not None and extra_v is not None:
        scores = torch.cat((scores, torch.matmul(queries, extra_k.transpose(-1, -2))), -1)
        values = torch.cat((values, extra_v), -2)
    out = torch.matmul(scores.softmax(-1).to(values.dtype), values)

    # Not unflatten, which ONNX has from opset 13 on.
    out = out.reshape(q.shape[0], q.shape[1], rows, columns, side, side, v.shape[2])
    if not torch.jit.is_scripting():
        if least > 1:
            return crop_exported_blocks(out, query_height, query_width)
    return crop_blocks(out, query_height, query_width)


def crop_blocks(out: Tensor, height: int, width: int) -> Tensor:
    """Order blocks (B, heads, rows, columns, h, w, d) as a map (B, heads, d, height, width) without their padding.

    A slice would bind an exported graph to maps that the block size does (or does not) divide; indexing by quotient and
    remainder is miscompiled by some versions of torch.compile (12 × 18 in blocks of 12).
    """
    out = out.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    y, x = torch.arange(height, device=out.device).unsqueeze(1), torch.arange(width, device=out.device)
    return out[:, :, y, x].permute(0, 1, 4, 2, 3)


def crop_exported_blocks(out: Tensor, height: int, width: int) -> Tensor:
    """Crop as :func:`crop_blocks` without tensors whose layout tells a map of one pixel from a larger one."""
    depth = out.shape[6]
    out = out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    y, x = (torch.ones(depth, size, dtype=torch.int64, device=out.device).cumsum(1) - 1 for size in (height, width))
    channel = torch.arange(depth, device=out.device).unsqueeze(1).unsqueeze(1)
    return out[:, :, channel, y.unsqueeze(2), x.unsqueeze(1)]


def block_positions(
    count: int, size: int, block: int, queries: int, before: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the queries (count, queries) and keys (count, window) of blocks in one direction."""
    blocks = torch.arange(count, device=device).clamp(max=(size - 1) // block).unsqueeze(1)
    keys = blocks * block - before + torch.arange(window, device=device)
    return blocks * queries + torch.arange(queries, device=device), keys


def gather_blocks(x: Tensor, y: Tensor, x_positions: Tensor) -> Tensor:
    """Gather (B, heads, d, H, W) at rows (rows, h) and columns (columns, w) as (B, heads, rows, columns, h, w, d)."""
    return x[:, :, :, y[:, None, :, None], x_positions[:, None, :]].permute(0, 1, 3, 4, 5, 6, 2)
