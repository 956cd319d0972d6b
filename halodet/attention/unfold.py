"""Halo attention over all blocks at once in plain PyTorch, for tracing, scripting, export and ``torch.compile``.

All accesses are by index, so one exported graph works for maps of any height and width.
"""

from halodet.attention.layout import BlockLayout

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
    return attend_windows(
        q, k, v, rel_h, rel_w, extra_k, extra_v, layout.height, layout.width, layout.block, halo, layout.stride,
        layout.mask, layout.scale,
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
) -> Tensor:
    """Compute :func:`halo_attention_unfold` from the fields of its layout; TorchScript can compile this function."""
    device, (top, bottom, left, right) = q.device, halo
    rows, columns = (height - 1) // block + 1, (width - 1) // block + 1
    query_height, query_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    side, window_height, window_width = block // stride, top + block + bottom, left + block + right
    # Map coordinates of each block's queries (blocks, queries) and window keys (blocks, window), per direction.
    query_y, key_y = _positions(rows, block, side, top, window_height, device)
    query_x, key_x = _positions(columns, block, side, left, window_width, device)
    inside_y, inside_x = (key_y >= 0) & (key_y < height), (key_x >= 0) & (key_x < width)

    # Coordinates outside the map read its edge; those queries are cropped at the end, keys and values zeroed or masked.
    queries = _gather(q, query_y.clamp(max=query_height - 1), query_x.clamp(max=query_width - 1))
    key_y, key_x = key_y.clamp(0, height - 1), key_x.clamp(0, width - 1)
    keys, values = _gather(k, key_y, key_x), _gather(v, key_y, key_x)
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

    # Gather the queries of the map and drop the padding of the last block. A slice would bind an exported graph to
    # maps that the block size does (or does not) divide; indexing by quotient and remainder is miscompiled by some
    # versions of torch.compile (12 × 18 in blocks of 12).
    # Not unflatten, which ONNX has from opset 13 on.
    batch, heads = q.shape[0], q.shape[1]
    out = out.reshape(batch, heads, rows, columns, side, side, v.shape[2]).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    y, x = torch.arange(query_height, device=device).unsqueeze(1), torch.arange(query_width, device=device)
    return out[:, :, y, x].permute(0, 1, 4, 2, 3)


def _positions(
    count: int, block: int, queries: int, before: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the queries (count, queries) and keys (count, window) of blocks in one direction."""
    blocks = torch.arange(count, device=device).unsqueeze(1)
    keys = blocks * block - before + torch.arange(window, device=device)
    return blocks * queries + torch.arange(queries, device=device), keys


def _gather(x: Tensor, y: Tensor, x_positions: Tensor) -> Tensor:
    """Gather (B, heads, d, H, W) at rows (rows, h) and columns (columns, w) as (B, heads, rows, columns, h, w, d)."""
    return x[:, :, :, y[:, None, :, None], x_positions[:, None, :]].permute(0, 1, 3, 4, 5, 6, 2)
