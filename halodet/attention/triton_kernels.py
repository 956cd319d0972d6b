"""The Triton kernels of halo attention; :mod:`.triton` starts them and says what they can do.

They read the maps in place, in the manner of flash attention: no window, score or weight is ever written to memory. A masked load makes
zeros of the pixels outside the map, and the backward computes the weights anew from the log-sum-exp of each query.

The position part of a logit is a sum of two numbers, one for the row of the key and one for its column. For a tile of queries
``_positions`` finds both kinds side by side with one product and one shift; a product with a matrix of two ones per key then adds them, and
the transpose of that product collects their gradients. Tensor cores do that faster than loads or shuffles would. Both position tables come
as one, without the rows that no query reads: ``ROWS_H`` rows for the height, then those for the width, so that query i and key r of the
window find their row at ``QUERIES - 1 - i + r``.

Nothing is added atomically, so that every run gives the same bits: a program of ``backward_queries`` owns queries, one of
``backward_keys`` pixels of the map of keys, one of ``backward_extra`` the extra keys of a block.

Sizes in capitals are known to the compiler. ``M`` stands for the queries of a tile, ``N`` for its keys. ``SPAN`` and sizes named
``..._PADDED`` are powers of two, as Triton wants them; what lies beyond the true size is zero or left out.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Logits are kept in base 2: that is the exponential the hardware has.
LOG2E = tl.constexpr(1.4426950408889634)
# Minus infinity that can be subtracted from itself. Should a query see such logits alone in its first tiles, what it adds up for them
# vanishes with its first real key, and every query has one.
NEVER = tl.constexpr(-1.0e30)
EXTRA_TILE = tl.constexpr(16)  # extra keys worked on at once
EXTRA_QUERIES = tl.constexpr(32)  # and the queries worked on with them for their gradients
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Sizes of the map change from image to image: a kernel is not compiled anew for those that happen to be 1 or a multiple of 16.
CHANGING = ["images", "height", "width", "query_height", "query_width", "rows", "columns", "heads"]


def _tuned(configs: list[triton.Config], interpreted: triton.Config, reset_to_zero: list[str] | None = None):
    """Choose the fastest of some tilings when a kernel first meets a kind of block, window and depth."""

    def suited(configs: list[triton.Config], arguments: dict, **constants: int) -> list[triton.Config]:
        # Tiles larger than a block's queries do work for nothing, much smaller ones read the window too often.
        queries = max(16, triton.next_power_of_2({**arguments, **constants}["QUERIES"] ** 2))
        return [c for c in configs if min(queries, 32) <= c.kwargs["BLOCK_M"] <= queries]

    return triton.autotune(
        [interpreted] if INTERPRETED else configs,
        key=["D_QK", "D_V", "BLOCK", "QUERIES", "WINDOW_H", "WINDOW_W"],
        reset_to_zero=reset_to_zero,
        prune_configs_by=None if INTERPRETED else {"early_config_prune": suited},
    )


def _config(warps: int, stages: int = 2, **sizes: int) -> triton.Config:
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


@triton.jit
def _place(index, rows, columns, tiles, heads):
    """The image, row, column, tile and head that a program works on. Heads change fastest: those of a pixel share lines of cache."""
    head = index % heads
    tile = index // heads % tiles
    column = index // (heads * tiles) % columns
    row = index // (heads * tiles * columns) % rows
    # All images together may hold more than 2³¹ numbers, one may not.
    image = (index // (heads * tiles * columns * rows)).to(tl.int64)
    return image, row, column, tile, head


@triton.jit
def _load(base, offsets, inside, DEPTH: tl.constexpr, PADDED: tl.constexpr):
    """Pixels of a map (N, PADDED)."""
    channel = tl.arange(0, PADDED)
    return tl.load(
        base + offsets[:, None] + channel[None, :], mask=inside[:, None] & (channel < DEPTH)[None, :], other=0.0
    )


@triton.jit
def _store(base, offsets, inside, x, DEPTH: tl.constexpr, PADDED: tl.constexpr):
    channel = tl.arange(0, PADDED)
    mask = inside[:, None] & (channel < DEPTH)[None, :]
    tl.store(base + offsets[:, None] + channel[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _queries(row, column, tile, query_height, query_width, QUERIES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile of a block's queries: row and column in the block and in the map, and whether they are in both."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = m // QUERIES
    j = m % QUERIES
    y = row * QUERIES + i
    x = column * QUERIES + j
    return i, j, y, x, (i < QUERIES) & (y < query_height) & (x < query_width)


@triton.jit
def _keys(
    start,
    top,
    left,
    height,
    width,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a tile of a window's keys: row and column in the window and in the map, whether they lie in the map and whether they count."""
    n = start + tl.arange(0, BLOCK_N)
    r = n // WINDOW_W
    c = n % WINDOW_W
    y = top + r
    x = left + c
    counted = r < WINDOW_H
    inside = counted & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    if MASK:
        counted = inside
    return r, c, y, x, inside, counted


@triton.jit
def _range(top, height, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, MASK: tl.constexpr):
    """The first key of a window that may count, and the end: rows outside the map are passed over where they are masked."""
    if MASK:
        return tl.maximum(-top, 0) * WINDOW_W, tl.minimum(WINDOW_H, height - top) * WINDOW_W
    else:
        return 0, WINDOW_H * WINDOW_W


@triton.jit
def _positions(
    q,
    table,
    i,
    j,
    H: tl.constexpr,
    ROWS_H: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Position logits (M, PADDED) of queries (i, j) of a block: first of the ``H`` rows of the window, then of its columns."""
    products = tl.dot(q, tl.trans(table), input_precision=PRECISION)
    return (
        tl.gather(
            products,
            _shift(tl.arange(0, PADDED)[None, :], i[:, None], j[:, None], H, ROWS_H, QUERIES, table.shape[0]),
            1,
        )
        * LOG2E
    )


@triton.jit
def _shift(number, i, j, H: tl.constexpr, ROWS_H: tl.constexpr, QUERIES: tl.constexpr, SPAN: tl.constexpr):
    """The row of the table for row ``number`` of the window, or for a column, those being counted after its ``H`` rows."""
    row = tl.where(number < H, number + QUERIES - 1 - i, number - H + ROWS_H + QUERIES - 1 - j)
    # Queries beyond the block's last, and numbers beyond the last column, may read anything.
    return tl.minimum(tl.maximum(row, 0), SPAN - 1)


@triton.jit
def _positions_back(
    grad,
    i,
    j,
    H: tl.constexpr,
    W: tl.constexpr,
    ROWS_H: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Undo the shift: from gradients (M, PADDED) of the logits to those of the products (M, SPAN) of queries and table."""
    row = tl.arange(0, SPAN)[None, :]
    for_h = row < ROWS_H
    number = tl.where(for_h, row - (QUERIES - 1 - i)[:, None], row - ROWS_H - (QUERIES - 1 - j)[:, None])
    exists = (number >= 0) & (number < tl.where(for_h, H, W))
    shifted = tl.gather(grad, tl.minimum(tl.maximum(number + tl.where(for_h, 0, H), 0), PADDED - 1), 1)
    return tl.where(exists, shifted, 0.0)


@triton.jit
def _two_ones(r, c, H: tl.constexpr, PADDED: tl.constexpr, dtype: tl.constexpr):
    """(PADDED, N): the column of a key holds a one for its row and one for its column in the window."""
    number = tl.arange(0, PADDED)[:, None]
    return ((number == r[None, :]) | (number == c[None, :] + H)).to(dtype)


@triton.jit
def _scores(q, keys, along, r, c, counted, scale, H: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits (M, N) of queries and a tile of the window."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.dot(along, _two_ones(r, c, H, PADDED, tl.float32), scores, input_precision=PRECISION)
    return tl.where(counted[None, :], scores, NEVER)


@triton.jit
def _mix(scores, values, highest, total, mixed, PRECISION: tl.constexpr):
    """Add a tile of values to the weighted sum, as the softmax that runs along the tiles weighs them."""
    new = tl.maximum(highest, tl.max(scores, 1))
    decay = tl.exp2(highest - new)
    weights = tl.exp2(scores - new[:, None])
    total = total * decay + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * decay[:, None], input_precision=PRECISION)
    return new, total, mixed


@_tuned(
    [
        _config(1, BLOCK_M=16, BLOCK_N=32),
        _config(2, BLOCK_M=16, BLOCK_N=64),
        _config(2, BLOCK_M=32, BLOCK_N=32),
        _config(4, BLOCK_M=64, BLOCK_N=32),
        _config(4, stages=3, BLOCK_M=64, BLOCK_N=32),
        _config(4, BLOCK_M=64, BLOCK_N=64),
        _config(8, BLOCK_M=128, BLOCK_N=64),
    ],
    _config(4, BLOCK_M=32, BLOCK_N=64),
)
@triton.jit(do_not_specialize=CHANGING)
def forward(
    q, k, v, table, extra_k, extra_v, out, lse, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, k_image, k_head, k_y, k_x, v_image, v_head, v_y, v_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, WINDOW_PADDED: tl.constexpr, SPAN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the queries of one block and head."""
    ROWS_H: tl.constexpr = WINDOW_H + QUERIES - 1
    ROWS_W: tl.constexpr = WINDOW_W + QUERIES - 1
    tiles = tl.cdiv(QUERIES * QUERIES, BLOCK_M)
    image, row, column, tile, head = _place(tl.program_id(0), rows, columns, tiles, heads)
    i, j, y, x, present = _queries(row, column, tile, query_height, query_width, QUERIES, BLOCK_M)
    queries = _load(q + image * q_image + head * q_head, y * q_y + x * q_x, present, D_QK, QK_PADDED)
    rows_of_table = tl.arange(0, SPAN)
    positions = _load(table, rows_of_table * D_QK, rows_of_table < ROWS_H + ROWS_W, D_QK, QK_PADDED)
    along = _positions(queries, positions, i, j, WINDOW_H, ROWS_H, QUERIES, WINDOW_PADDED, PRECISION)
    highest = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, V_PADDED], tl.float32)

    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    top = row * BLOCK - TOP
    left = column * BLOCK - LEFT
    first, end = _range(top, height, WINDOW_H, WINDOW_W, MASK)
    for start in range(first, end, BLOCK_N):
        r, c, key_y, key_x, inside, counted = _keys(start, top, left, height, width, WINDOW_H, WINDOW_W, MASK, BLOCK_N)
        keys = _load(k, key_y * k_y + key_x * k_x, inside, D_QK, QK_PADDED)
        values = _load(v, key_y * v_y + key_x * v_x, inside, D_V, V_PADDED)
        scores = _scores(queries, keys, along, r, c, counted, scale * LOG2E, WINDOW_H, WINDOW_PADDED, PRECISION)
        highest, total, mixed = _mix(scores, values, highest, total, mixed, PRECISION)
    if EXTRA:
        block = ((image * heads + head) * rows + row) * columns + column
        for start in range(0, EXTRA, EXTRA_TILE):
            e = start + tl.arange(0, EXTRA_TILE)
            keys = _load(extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, D_QK, QK_PADDED)
            values = _load(extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, D_V, V_PADDED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            highest, total, mixed = _mix(
                tl.where((e < EXTRA)[None, :], scores, NEVER), values, highest, total, mixed, PRECISION
            )

    out += (image * query_height * query_width * heads + head) * D_V
    _store(out, (y * query_width + x) * heads * D_V, present, mixed / total[:, None], D_V, V_PADDED)
    lse += (image * heads + head) * query_height * query_width
    tl.store(lse + y * query_width + x, highest + tl.log2(total), mask=present)


@_tuned(
    [
        _config(1, BLOCK_M=16, BLOCK_N=32),
        _config(2, BLOCK_M=16, BLOCK_N=64),
        _config(2, BLOCK_M=32, BLOCK_N=32),
        _config(4, BLOCK_M=64, BLOCK_N=32),
        _config(4, BLOCK_M=64, BLOCK_N=64),
        _config(8, BLOCK_M=64, BLOCK_N=64),
    ],
    _config(4, BLOCK_M=32, BLOCK_N=64),
    reset_to_zero=["grad_table"],
)
@triton.jit(do_not_specialize=CHANGING)
def backward_queries(
    q, k, v, table, extra_k, extra_v, out, lse, grad, delta, grad_q, grad_table, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, k_image, k_head, k_y, k_x, v_image, v_head, v_y, v_x, grad_image, grad_head, grad_y, grad_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, WINDOW_PADDED: tl.constexpr, SPAN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and of the position table one summand per program; ``delta``, the products of out and grad, on the way.

    One program: every ``num_programs``-th of the tiles of queries, so that few summands are left.
    """
    ROWS_H: tl.constexpr = WINDOW_H + QUERIES - 1
    ROWS_W: tl.constexpr = WINDOW_W + QUERIES - 1
    tiles = tl.cdiv(QUERIES * QUERIES, BLOCK_M)
    grad_table += tl.program_id(0) * ((ROWS_H + ROWS_W) * D_QK)
    rows_of_table = tl.arange(0, SPAN)
    # What is alike for all tiles would fill the registers if the compiler moved it out of this loop.
    for item in tl.range(
        tl.program_id(0), images * rows * columns * tiles * heads, tl.num_programs(0), disable_licm=True
    ):
        image, row, column, tile, head = _place(item, rows, columns, tiles, heads)
        i, j, y, x, present = _queries(row, column, tile, query_height, query_width, QUERIES, BLOCK_M)
        queries = _load(q + image * q_image + head * q_head, y * q_y + x * q_x, present, D_QK, QK_PADDED)
        positions = _load(table, rows_of_table * D_QK, rows_of_table < ROWS_H + ROWS_W, D_QK, QK_PADDED)
        along = _positions(queries, positions, i, j, WINDOW_H, ROWS_H, QUERIES, WINDOW_PADDED, PRECISION)
        grads = _load(grad + image * grad_image + head * grad_head, y * grad_y + x * grad_x, present, D_V, V_PADDED)
        pixel = y * query_width + x
        out_offset = (image * query_height * query_width * heads + head) * D_V
        outs = _load(out + out_offset, pixel * heads * D_V, present, D_V, V_PADDED)
        inner = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
        query_offset = (image * heads + head) * query_height * query_width
        tl.store(delta + query_offset + pixel, inner, mask=present)
        # A query outside the map weighs nothing: 2 to the power of minus infinity.
        norm = tl.load(lse + query_offset + pixel, mask=present, other=float("inf"))

        grad_queries = tl.zeros([BLOCK_M, QK_PADDED], tl.float32)
        grad_along = tl.zeros([BLOCK_M, WINDOW_PADDED], tl.float32)
        k_base = k + image * k_image + head * k_head
        v_base = v + image * v_image + head * v_head
        top = row * BLOCK - TOP
        left = column * BLOCK - LEFT
        first, end = _range(top, height, WINDOW_H, WINDOW_W, MASK)
        for start in range(first, end, BLOCK_N):
            r, c, key_y, key_x, inside, counted = _keys(
                start, top, left, height, width, WINDOW_H, WINDOW_W, MASK, BLOCK_N
            )
            keys = _load(k_base, key_y * k_y + key_x * k_x, inside, D_QK, QK_PADDED)
            values = _load(v_base, key_y * v_y + key_x * v_x, inside, D_V, V_PADDED)
            scores = _scores(queries, keys, along, r, c, counted, scale * LOG2E, WINDOW_H, WINDOW_PADDED, PRECISION)
            grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            grad_scores = (tl.exp2(scores - norm[:, None]) * (grad_weights - inner[:, None])).to(keys.dtype)
            grad_queries = tl.dot(grad_scores, keys, grad_queries, input_precision=PRECISION)
            ones = tl.trans(_two_ones(r, c, WINDOW_H, WINDOW_PADDED, keys.dtype))
            grad_along = tl.dot(grad_scores, ones, grad_along, input_precision=PRECISION)
        if EXTRA:
            block = ((image * heads + head) * rows + row) * columns + column
            for start in range(0, EXTRA, EXTRA_TILE):
                e = start + tl.arange(0, EXTRA_TILE)
                keys = _load(extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, D_QK, QK_PADDED)
                values = _load(extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, D_V, V_PADDED)
                scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
                grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
                scores = tl.where((e < EXTRA)[None, :], scores, NEVER)
                grad_scores = (tl.exp2(scores - norm[:, None]) * (grad_weights - inner[:, None])).to(keys.dtype)
                grad_queries = tl.dot(grad_scores, keys, grad_queries, input_precision=PRECISION)

        products = _positions_back(grad_along, i, j, WINDOW_H, WINDOW_W, ROWS_H, QUERIES, WINDOW_PADDED, SPAN).to(
            queries.dtype
        )
        grad_queries = tl.dot(products, positions, grad_queries * scale, input_precision=PRECISION)
        grad_q_offset = (image * query_height * query_width * heads + head) * D_QK
        _store(grad_q + grad_q_offset, pixel * heads * D_QK, present, grad_queries, D_QK, QK_PADDED)

        # The sum would take too many registers across the loop above: it stays in memory that only this program touches.
        summand = _load(grad_table, rows_of_table * D_QK, rows_of_table < ROWS_H + ROWS_W, D_QK, QK_PADDED)
        summand = tl.dot(tl.trans(products), queries, summand, input_precision=PRECISION)
        _store(grad_table, rows_of_table * D_QK, rows_of_table < ROWS_H + ROWS_W, summand, D_QK, QK_PADDED)
        tl.debug_barrier()  # what one thread has stored another may load for the next tile


@triton.jit
def _key_step(keys, values, queries, grads, scores, norm, inner, grad_keys, grad_values, PRECISION: tl.constexpr):
    """Add what a tile of queries gives to the gradients of keys and values; scores are (N, M)."""
    weights = tl.exp2(scores - norm[None, :])
    grad_values = tl.dot(weights.to(grads.dtype), grads, grad_values, input_precision=PRECISION)
    grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    grad_scores = (weights * (grad_weights - inner[None, :])).to(queries.dtype)
    grad_keys = tl.dot(grad_scores, queries, grad_keys, input_precision=PRECISION)
    return grad_keys, grad_values


@_tuned(
    [
        _config(1, TILE_H=4, TILE_W=4, BLOCK_M=16),
        _config(2, TILE_H=4, TILE_W=8, BLOCK_M=16),
        _config(1, TILE_H=4, TILE_W=4, BLOCK_M=32),
        _config(2, TILE_H=4, TILE_W=8, BLOCK_M=32),
        _config(4, TILE_H=8, TILE_W=8, BLOCK_M=32),
        _config(4, TILE_H=8, TILE_W=8, BLOCK_M=64),
    ],
    _config(4, TILE_H=4, TILE_W=8, BLOCK_M=32),
)
@triton.heuristics(
    {
        "TILE_PADDED": lambda sizes: max(16, triton.next_power_of_2(sizes["TILE_H"] + sizes["TILE_W"])),
        "SPAN": lambda sizes: max(
            16, triton.next_power_of_2(sizes["TILE_H"] + sizes["TILE_W"] + 2 * sizes["QUERIES"] - 2)
        ),
    }
)
@triton.jit(do_not_specialize=CHANGING)
def backward_keys(
    q, k, v, table, lse, grad, delta, grad_k, grad_v, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, k_image, k_head, k_y, k_x, v_image, v_head, v_y, v_x, grad_image, grad_head, grad_y, grad_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, PRECISION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, TILE_PADDED: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values.

    One program: a rectangle of the map, of one head. The blocks whose windows cover some of it lie in a rectangle too, and are fewest where
    the first begins as far below the map's edge as windows reach below their blocks: where the two are of a size, 4 blocks and not 9.
    """
    BELOW: tl.constexpr = WINDOW_H - TOP - BLOCK
    RIGHT: tl.constexpr = WINDOW_W - LEFT - BLOCK
    LEAD_Y: tl.constexpr = (TILE_H - BELOW % TILE_H) % TILE_H
    LEAD_X: tl.constexpr = (TILE_W - RIGHT % TILE_W) % TILE_W
    tiles_y = tl.cdiv(height + LEAD_Y, TILE_H)
    tiles_x = tl.cdiv(width + LEAD_X, TILE_W)
    image, tile_y, tile_x, _, head = _place(tl.program_id(0), tiles_y, tiles_x, 1, heads)
    first_y = tile_y * TILE_H - LEAD_Y
    first_x = tile_x * TILE_W - LEAD_X
    n = tl.arange(0, TILE_H * TILE_W)
    y = first_y + n // TILE_W
    x = first_x + n % TILE_W
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    keys = _load(k + image * k_image + head * k_head, y * k_y + x * k_x, inside, D_QK, QK_PADDED)
    values = _load(v + image * v_image + head * v_head, y * v_y + x * v_x, inside, D_V, V_PADDED)
    grad_keys = tl.zeros([TILE_H * TILE_W, QK_PADDED], tl.float32)
    grad_values = tl.zeros([TILE_H * TILE_W, V_PADDED], tl.float32)

    row = tl.maximum(first_y - BELOW, 0) // BLOCK
    column = tl.maximum(first_x - RIGHT, 0) // BLOCK
    end_row = tl.minimum((first_y + TILE_H - 1 + TOP) // BLOCK + 1, rows)
    end_column = tl.minimum((first_x + TILE_W - 1 + LEFT) // BLOCK + 1, columns)
    ROWS_H: tl.constexpr = WINDOW_H + QUERIES - 1
    ROWS_W: tl.constexpr = WINDOW_W + QUERIES - 1
    REACH_H: tl.constexpr = TILE_H + QUERIES - 1
    ones = tl.trans(_two_ones(n // TILE_W, n % TILE_W, TILE_H, TILE_PADDED, tl.float32))
    TILES: tl.constexpr = (QUERIES * QUERIES + BLOCK_M - 1) // BLOCK_M
    across = (end_column - column) * TILES
    q += image * q_image + head * q_head
    grad += image * grad_image + head * grad_head
    lse += (image * heads + head) * query_height * query_width
    delta += (image * heads + head) * query_height * query_width
    for visit in range(0, (end_row - row) * across):
        block_y = row + visit // across
        block_x = column + visit % across // TILES
        i, j, query_y, query_x, present = _queries(
            block_y, block_x, visit % TILES, query_height, query_width, QUERIES, BLOCK_M
        )
        queries = _load(q, query_y * q_y + query_x * q_x, present, D_QK, QK_PADDED)
        grads = _load(grad, query_y * grad_y + query_x * grad_x, present, D_V, V_PADDED)
        norm = tl.load(lse + query_y * query_width + query_x, mask=present, other=float("inf"))
        inner = tl.load(delta + query_y * query_width + query_x, mask=present, other=0.0)

        # The first row and column of the rectangle, counted in the window of this block; they may lie outside it. Of the table only the
        # rows are needed for keys from there on.
        r = first_y - block_y * BLOCK + TOP
        c = first_x - block_x * BLOCK + LEFT
        t = tl.arange(0, SPAN)
        for_h = t < REACH_H
        t = tl.where(for_h, t + r, t - REACH_H + c)
        exists = (t >= 0) & (t < tl.where(for_h, ROWS_H, ROWS_W))
        positions = _load(table, tl.where(for_h, t, t + ROWS_H) * D_QK, exists, D_QK, QK_PADDED)
        products = tl.dot(positions, tl.trans(queries), input_precision=PRECISION)
        number = tl.arange(0, TILE_PADDED)[:, None]
        along = tl.gather(products, _shift(number, i[None, :], j[None, :], TILE_H, REACH_H, QUERIES, SPAN), 0) * LOG2E
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.dot(ones, along, scores, input_precision=PRECISION)
        r += n // TILE_W
        c += n % TILE_W
        covered = inside & (r >= 0) & (r < WINDOW_H) & (c >= 0) & (c < WINDOW_W)
        scores = tl.where(covered[:, None], scores, NEVER)
        grad_keys, grad_values = _key_step(
            keys, values, queries, grads, scores, norm, inner, grad_keys, grad_values, PRECISION
        )

    pixel = (image * height + y) * width + x
    _store(grad_k + head * D_QK, pixel * heads * D_QK, inside, grad_keys * scale, D_QK, QK_PADDED)
    _store(grad_v + head * D_V, pixel * heads * D_V, inside, grad_values, D_V, V_PADDED)


@triton.jit(do_not_specialize=CHANGING)
def backward_extra(
    q, extra_k, extra_v, lse, grad, delta, grad_extra_k, grad_extra_v, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, grad_image, grad_head, grad_y, grad_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, EXTRA: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of extra keys and values. One program: a tile of those of one block and head."""
    image, row, column, tile, head = _place(tl.program_id(0), rows, columns, tl.cdiv(EXTRA, EXTRA_TILE), heads)
    e = tile * EXTRA_TILE + tl.arange(0, EXTRA_TILE)
    block = ((image * heads + head) * rows + row) * columns + column
    keys = _load(extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, D_QK, QK_PADDED)
    values = _load(extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, D_V, V_PADDED)
    grad_keys = tl.zeros([EXTRA_TILE, QK_PADDED], tl.float32)
    grad_values = tl.zeros([EXTRA_TILE, V_PADDED], tl.float32)
    query_offset = (image * heads + head) * query_height * query_width
    for query_tile in range(0, tl.cdiv(QUERIES * QUERIES, EXTRA_QUERIES)):
        _, _, y, x, present = _queries(row, column, query_tile, query_height, query_width, QUERIES, EXTRA_QUERIES)
        queries = _load(q + image * q_image + head * q_head, y * q_y + x * q_x, present, D_QK, QK_PADDED)
        grads = _load(grad + image * grad_image + head * grad_head, y * grad_y + x * grad_x, present, D_V, V_PADDED)
        norm = tl.load(lse + query_offset + y * query_width + x, mask=present, other=float("inf"))
        inner = tl.load(delta + query_offset + y * query_width + x, mask=present, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where((e < EXTRA)[:, None], scores, NEVER)
        grad_keys, grad_values = _key_step(
            keys, values, queries, grads, scores, norm, inner, grad_keys, grad_values, PRECISION
        )
    _store(grad_extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, grad_keys * scale, D_QK, QK_PADDED)
    _store(grad_extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, grad_values, D_V, V_PADDED)
