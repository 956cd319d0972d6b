"""Triton kernels of halo attention; :mod:`.triton_ops` launches them and checks what they support.

The kernels read the maps in place, as flash attention does: no window, score or weight is written to memory. Masked
loads return zeros for pixels outside the map; the backward recomputes the weights from the log-sum-exp of each query.

The relative position logit is the sum of a row term and a column term. For a tile of queries ``_rel_logits`` computes
both side by side with one product and one shift; a product with a matrix of two ones per key (``_rel_selector``) adds
them, and the transpose of that product accumulates their gradients. On tensor cores this is faster than loads or
shuffles. The two position tables are passed as one, without the rows that no query reads: ``ROWS_H`` rows for the
height followed by those for the width; the row for query i and window position r is ``QUERIES - 1 - i + r``.

No atomics are used, so results are deterministic: a program of ``backward_queries`` owns queries, one of
``backward_keys`` pixels of the key map, one of ``backward_extra`` the extra keys of a block.

Names in capitals are compile-time constants. ``M`` is the queries of a tile, ``N`` its keys. ``SPAN`` and names
ending in ``_PADDED`` are powers of two, as Triton requires; elements beyond the true size are zero or masked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import triton
import triton.language as tl
from triton.runtime import driver

# Logits are in base 2, the exponential that the hardware implements.
LOG2E = tl.constexpr(1.4426950408889634)
# Finite stand-in for -inf, so that differences are not NaN. Sums over fully masked tiles are rescaled to zero at the
# first unmasked key, and every query has one.
MASKED = tl.constexpr(-1.0e30)
EXTRA_TILE = tl.constexpr(16)  # extra keys per tile
EXTRA_QUERIES = tl.constexpr(32)  # queries per tile of extra keys in backward_extra
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Position logits of half types are split into bfloat16, which the interpreter cannot multiply.
SPLIT = tl.constexpr(not INTERPRETED)
MAX_MEASURED = 4  # tilings, of which the fastest is used
# Bytes of registers per thread that a preferred tiling, and any tiling, may spill. The driver reserves this memory for
# all threads that a GPU can run, outside PyTorch's allocator: 2 KiB are half a gigabyte on a large GPU.
MAX_SPILLED, MAX_SPILLED_EVER = 512, 2048
# Map sizes change from image to image; do not recompile for those that are 1 or a multiple of 16.
DYNAMIC_SIZES = ["images", "height", "width", "query_height", "query_width", "rows", "columns", "heads"]


def _autotune(configs: list[triton.Config], interpreted: triton.Config):
    """Choose the tiling once for each block size, window, depth and precision; the preferred ones come first.

    With ``TUNED`` the fastest on this GPU is measured, and the result is kept in Triton's cache; otherwise the first
    that :func:`select_tilings` returns is used, which is the same in each process.
    """

    def decorate(kernel):
        def prune(configs: list[triton.Config], arguments: dict, **constants: Any) -> list[triton.Config]:
            values = {**arguments, **constants}
            limit = driver.active.utils.get_device_properties(values["q"].device.index)["max_shared_mem"]
            values = {name: value for name, value in values.items() if name not in ("grid", "warmup")}
            found = select_tilings(sized_tilings(configs, values["QUERIES"]), partial(_measure, kernel, values), limit)
            return list(islice(found, MAX_MEASURED if values["TUNED"] else 1))

        return triton.autotune(
            [interpreted] if INTERPRETED else configs,
            key=["D_QK", "D_V", "BLOCK", "QUERIES", "WINDOW_H", "WINDOW_W", "PRECISION", "MASK", "EXTRA", "TUNED"],
            prune_configs_by=None if INTERPRETED else {"early_config_prune": prune},
            cache_results=True,
        )(kernel)

    return decorate


def sized_tilings(configs: Sequence[triton.Config], queries: int) -> list[triton.Config]:
    """Return the tilings for blocks of ``queries`` x ``queries``: larger tiles would waste work."""
    limit = max(16, triton.next_power_of_2(queries**2))
    return [config for config in configs if config.kwargs["BLOCK_M"] <= limit]


def select_tilings(
    configs: Sequence[triton.Config], measure: Callable[[triton.Config], tuple[int, int]], limit: int
) -> Iterator[triton.Config]:
    """Yield the tilings that the GPU can run without spilling registers, or else the one that spills least.

    Args:
        configs: tilings, the preferred ones first.
        measure: compiles a tiling and returns its shared memory and its spilled registers per thread, in bytes.
        limit: shared memory that a block of threads may use, in bytes.

    Raises:
        RuntimeError: no tiling compiles and fits.
    """
    spilling: list[tuple[int, int]] = []
    reasons: list[str] = []
    good = 0
    for index, config in enumerate(configs):
        try:
            shared, spilled = measure(config)
        except Exception as error:  # the compiler raises nearly anything
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split()))
            continue
        if shared > limit:
            reasons.append(f"it needs {shared} bytes of shared memory, the GPU has {limit}")
        elif spilled > MAX_SPILLED_EVER:
            reasons.append(f"it spills {spilled} bytes of registers per thread")
        elif spilled > MAX_SPILLED:
            spilling.append((spilled, index))
        else:
            good += 1
            yield config
    if not good and spilling:
        yield configs[min(spilling)[1]]
    elif not good:
        raise RuntimeError(
            f"no tiling of {len(configs)} compiles and fits: {reasons[0] if reasons else 'there is none'}"
        )


def _measure(kernel: Any, values: dict[str, Any], config: triton.Config) -> tuple[int, int]:
    """Compile a tiling; see :func:`select_tilings`."""
    compiled = kernel.warmup(grid=(1,), **values, **config.all_kwargs())
    compiled._init_handles()
    return compiled.metadata.shared, 4 * compiled.n_spills


def _config(warps: int, stages: int = 2, registers: int | None = None, **sizes: int) -> triton.Config:
    """Return a tiling; fewer ``registers`` per thread let the GPU run more warps at the same time."""
    return triton.Config(sizes, num_warps=warps, num_stages=stages, maxnreg=registers)


@triton.jit
def _decompose_index(index, rows, columns, tiles, heads):
    """Return image, row, column, tile and head of a program. Heads vary fastest: those of a pixel share cache lines."""
    head = index % heads
    tile = index // heads % tiles
    column = index // (heads * tiles) % columns
    row = index // (heads * tiles * columns) % rows
    # A batch may hold more than 2**31 elements, an image may not.
    image = (index // (heads * tiles * columns * rows)).to(tl.int64)
    return image, row, column, tile, head


@triton.jit
def _load(base, offsets, inside, DEPTH: tl.constexpr, PADDED: tl.constexpr):
    """Load the pixels at ``offsets`` as (N, PADDED)."""
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
def _query_tile(row, column, tile, query_height, query_width, QUERIES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return row and column in the block and in the map for a tile of queries, and whether they are in both."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = m // QUERIES
    j = m % QUERIES
    y = row * QUERIES + i
    x = column * QUERIES + j
    return i, j, y, x, (i < QUERIES) & (y < query_height) & (x < query_width)


@triton.jit
def _key_tile(
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
    """Return row and column in the window and in the map for a tile of keys, if they are in the map and unmasked."""
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
def _key_range(top, height, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, MASK: tl.constexpr):
    """Return the range of keys to visit in a window: masked rows outside the map are skipped."""
    if MASK:
        return tl.maximum(-top, 0) * WINDOW_W, tl.minimum(WINDOW_H, height - top) * WINDOW_W
    else:
        return 0, WINDOW_H * WINDOW_W


@triton.jit
def _rel_logits(
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
    """Compute position logits (M, PADDED) of queries (i, j): those of the ``H`` window rows, then of the columns."""
    products = tl.dot(q, tl.trans(table), input_precision=PRECISION)
    return (
        tl.gather(
            products,
            _rel_index(tl.arange(0, PADDED)[None, :], i[:, None], j[:, None], H, ROWS_H, QUERIES, table.shape[0]),
            1,
        )
        * LOG2E
    )


@triton.jit
def _rel_index(index, i, j, H: tl.constexpr, ROWS_H: tl.constexpr, QUERIES: tl.constexpr, SPAN: tl.constexpr):
    """Return the table row for window position ``index``: the ``H`` rows of the window come first, then its columns."""
    row = tl.where(index < H, index + QUERIES - 1 - i, index - H + ROWS_H + QUERIES - 1 - j)
    # Queries beyond the block and indices beyond the last column are unused and may read any row.
    return tl.minimum(tl.maximum(row, 0), SPAN - 1)


@triton.jit
def _rel_logits_backward(
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
    """Transpose the shift: gradients (M, PADDED) of the logits to those (M, SPAN) of the query-table products."""
    row = tl.arange(0, SPAN)[None, :]
    is_row = row < ROWS_H
    index = tl.where(is_row, row - (QUERIES - 1 - i)[:, None], row - ROWS_H - (QUERIES - 1 - j)[:, None])
    in_table = (index >= 0) & (index < tl.where(is_row, H, W))
    shifted = tl.gather(grad, tl.minimum(tl.maximum(index + tl.where(is_row, 0, H), 0), PADDED - 1), 1)
    return tl.where(in_table, shifted, 0.0)


@triton.jit
def _rel_selector(r, c, H: tl.constexpr, PADDED: tl.constexpr, dtype: tl.constexpr):
    """Return a (PADDED, N) matrix with two ones per key: at its row and at its column in the window."""
    index = tl.arange(0, PADDED)[:, None]
    return ((index == r[None, :]) | (index == c[None, :] + H)).to(dtype)


@triton.jit
def _scores(q, keys, rel_logits, r, c, counted, scale, H: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """Compute the logits (M, N) of queries and a tile of keys."""
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if q.dtype == tl.float32 or not SPLIT:
        scores = tl.dot(rel_logits, _rel_selector(r, c, H, PADDED, tl.float32), scores, input_precision=PRECISION)
    else:
        selector = _rel_selector(r, c, H, PADDED, tl.bfloat16)
        high, low = _split(rel_logits)
        scores = tl.dot(low, selector, tl.dot(high, selector, scores))
    return tl.where(counted[None, :], scores, MASKED)


@triton.jit
def _split(x):
    """Split float32 numbers into two bfloat16 that add up to 16 bits of each: tensor cores truncate float32 to 10."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _online_softmax_step(scores, values, running_max, running_sum, accumulator, PRECISION: tl.constexpr):
    """Accumulate a tile of values with the online softmax."""
    new = tl.maximum(running_max, tl.max(scores, 1))
    decay = tl.exp2(running_max - new)
    weights = tl.exp2(scores - new[:, None])
    running_sum = running_sum * decay + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator * decay[:, None], input_precision=PRECISION)
    return new, running_sum, accumulator


@_autotune(
    [
        _config(4, stages=3, BLOCK_M=64, BLOCK_N=32),
        _config(4, stages=3, BLOCK_M=64, BLOCK_N=64),
        _config(4, stages=2, BLOCK_M=32, BLOCK_N=32),
        _config(8, stages=3, BLOCK_M=128, BLOCK_N=64),
        _config(2, stages=3, BLOCK_M=16, BLOCK_N=64),
        _config(1, stages=2, BLOCK_M=16, BLOCK_N=32),
    ],
    _config(4, BLOCK_M=32, BLOCK_N=64),
)
@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def forward(
    q, k, v, table, extra_k, extra_v, out, lse, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, k_image, k_head, k_y, k_x, v_image, v_head, v_y, v_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, WINDOW_PADDED: tl.constexpr, SPAN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, TUNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute output and log-sum-exp. One program: a tile of the queries of one block and head."""
    ROWS_H: tl.constexpr = WINDOW_H + QUERIES - 1
    ROWS_W: tl.constexpr = WINDOW_W + QUERIES - 1
    tiles = tl.cdiv(QUERIES * QUERIES, BLOCK_M)
    image, row, column, tile, head = _decompose_index(tl.program_id(0), rows, columns, tiles, heads)
    i, j, y, x, valid = _query_tile(row, column, tile, query_height, query_width, QUERIES, BLOCK_M)
    queries = _load(q + image * q_image + head * q_head, y * q_y + x * q_x, valid, D_QK, QK_PADDED)
    rows_of_table = tl.arange(0, SPAN)
    positions = _load(table, rows_of_table * D_QK, rows_of_table < ROWS_H + ROWS_W, D_QK, QK_PADDED)
    rel_logits = _rel_logits(queries, positions, i, j, WINDOW_H, ROWS_H, QUERIES, WINDOW_PADDED, PRECISION)
    running_max = tl.full([BLOCK_M], MASKED, tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, V_PADDED], tl.float32)

    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    top = row * BLOCK - TOP
    left = column * BLOCK - LEFT
    first, end = _key_range(top, height, WINDOW_H, WINDOW_W, MASK)
    for start in range(first, end, BLOCK_N):
        r, c, key_y, key_x, inside, counted = _key_tile(
            start, top, left, height, width, WINDOW_H, WINDOW_W, MASK, BLOCK_N
        )
        keys = _load(k, key_y * k_y + key_x * k_x, inside, D_QK, QK_PADDED)
        values = _load(v, key_y * v_y + key_x * v_x, inside, D_V, V_PADDED)
        scores = _scores(queries, keys, rel_logits, r, c, counted, scale * LOG2E, WINDOW_H, WINDOW_PADDED, PRECISION)
        running_max, running_sum, accumulator = _online_softmax_step(
            scores, values, running_max, running_sum, accumulator, PRECISION
        )
    if EXTRA:
        block = ((image * heads + head) * rows + row) * columns + column
        for start in range(0, EXTRA, EXTRA_TILE):
            e = start + tl.arange(0, EXTRA_TILE)
            keys = _load(extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, D_QK, QK_PADDED)
            values = _load(extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, D_V, V_PADDED)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            running_max, running_sum, accumulator = _online_softmax_step(
                tl.where((e < EXTRA)[None, :], scores, MASKED), values, running_max, running_sum, accumulator, PRECISION
            )

    out += (image * query_height * query_width * heads + head) * D_V
    _store(out, (y * query_width + x) * heads * D_V, valid, accumulator / running_sum[:, None], D_V, V_PADDED)
    lse += (image * heads + head) * query_height * query_width
    tl.store(lse + y * query_width + x, running_max + tl.log2(running_sum), mask=valid)


@_autotune(
    [
        _config(4, registers=168, BLOCK_M=32, BLOCK_N=32),
        _config(8, registers=128, BLOCK_M=64, BLOCK_N=32),
        _config(4, stages=3, BLOCK_M=64, BLOCK_N=32),
        _config(8, BLOCK_M=64, BLOCK_N=32),
        _config(4, BLOCK_M=32, BLOCK_N=32),
        _config(2, BLOCK_M=16, BLOCK_N=64),
        _config(4, BLOCK_M=16, BLOCK_N=32),
    ],
    _config(4, BLOCK_M=32, BLOCK_N=64),
)
@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def backward_queries(
    q, k, v, table, extra_k, extra_v, out, lse, grad, delta, grad_q, grad_table, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, k_image, k_head, k_y, k_x, v_image, v_head, v_y, v_x,
    grad_image, grad_head, grad_y, grad_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, WINDOW_PADDED: tl.constexpr, SPAN: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, TUNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute query gradients, a partial table gradient per program, and ``delta`` (row sums of out * grad).

    One program: every ``num_programs``-th tile of queries, which keeps the number of partial sums small.
    """
    ROWS_H: tl.constexpr = WINDOW_H + QUERIES - 1
    ROWS_W: tl.constexpr = WINDOW_W + QUERIES - 1
    tiles = tl.cdiv(QUERIES * QUERIES, BLOCK_M)
    grad_table += tl.program_id(0) * ((ROWS_H + ROWS_W) * D_QK)
    rows_of_table = tl.arange(0, SPAN)
    # Hoisting loop invariants out of this loop would spill registers.
    for item in tl.range(
        tl.program_id(0), images * rows * columns * tiles * heads, tl.num_programs(0), disable_licm=True
    ):
        image, row, column, tile, head = _decompose_index(item, rows, columns, tiles, heads)
        i, j, y, x, valid = _query_tile(row, column, tile, query_height, query_width, QUERIES, BLOCK_M)
        queries = _load(q + image * q_image + head * q_head, y * q_y + x * q_x, valid, D_QK, QK_PADDED)
        positions = _load(table, rows_of_table * D_QK, rows_of_table < ROWS_H + ROWS_W, D_QK, QK_PADDED)
        rel_logits = _rel_logits(queries, positions, i, j, WINDOW_H, ROWS_H, QUERIES, WINDOW_PADDED, PRECISION)
        grads = _load(grad + image * grad_image + head * grad_head, y * grad_y + x * grad_x, valid, D_V, V_PADDED)
        pixel = y * query_width + x
        out_offset = (image * query_height * query_width * heads + head) * D_V
        outs = _load(out + out_offset, pixel * heads * D_V, valid, D_V, V_PADDED)
        row_delta = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
        query_offset = (image * heads + head) * query_height * query_width
        tl.store(delta + query_offset + pixel, row_delta, mask=valid)
        # Queries outside the map get weight exp2(-inf) = 0.
        row_lse = tl.load(lse + query_offset + pixel, mask=valid, other=float("inf"))

        grad_queries = tl.zeros([BLOCK_M, QK_PADDED], tl.float32)
        grad_rel_logits = tl.zeros([BLOCK_M, WINDOW_PADDED], tl.float32)
        k_base = k + image * k_image + head * k_head
        v_base = v + image * v_image + head * v_head
        top = row * BLOCK - TOP
        left = column * BLOCK - LEFT
        first, end = _key_range(top, height, WINDOW_H, WINDOW_W, MASK)
        for start in range(first, end, BLOCK_N):
            r, c, key_y, key_x, inside, counted = _key_tile(
                start, top, left, height, width, WINDOW_H, WINDOW_W, MASK, BLOCK_N
            )
            keys = _load(k_base, key_y * k_y + key_x * k_x, inside, D_QK, QK_PADDED)
            values = _load(v_base, key_y * v_y + key_x * v_x, inside, D_V, V_PADDED)
            scores = _scores(
                queries, keys, rel_logits, r, c, counted, scale * LOG2E, WINDOW_H, WINDOW_PADDED, PRECISION
            )
            grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            grad_scores = (tl.exp2(scores - row_lse[:, None]) * (grad_weights - row_delta[:, None])).to(keys.dtype)
            grad_queries = tl.dot(grad_scores, keys, grad_queries, input_precision=PRECISION)
            selector = tl.trans(_rel_selector(r, c, WINDOW_H, WINDOW_PADDED, keys.dtype))
            grad_rel_logits = tl.dot(grad_scores, selector, grad_rel_logits, input_precision=PRECISION)
        if EXTRA:
            block = ((image * heads + head) * rows + row) * columns + column
            for start in range(0, EXTRA, EXTRA_TILE):
                e = start + tl.arange(0, EXTRA_TILE)
                keys = _load(extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, D_QK, QK_PADDED)
                values = _load(extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, D_V, V_PADDED)
                scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
                grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
                scores = tl.where((e < EXTRA)[None, :], scores, MASKED)
                grad_scores = (tl.exp2(scores - row_lse[:, None]) * (grad_weights - row_delta[:, None])).to(keys.dtype)
                grad_queries = tl.dot(grad_scores, keys, grad_queries, input_precision=PRECISION)

        products = _rel_logits_backward(
            grad_rel_logits, i, j, WINDOW_H, WINDOW_W, ROWS_H, QUERIES, WINDOW_PADDED, SPAN
        ).to(queries.dtype)
        grad_queries = tl.dot(products, positions, grad_queries * scale, input_precision=PRECISION)
        grad_q_offset = (image * query_height * query_width * heads + head) * D_QK
        _store(grad_q + grad_q_offset, pixel * heads * D_QK, valid, grad_queries, D_QK, QK_PADDED)

        # Accumulated in memory owned by this program, which its first tile initializes: in registers it would spill
        # across the loop above.
        accumulated = (rows_of_table < ROWS_H + ROWS_W) & (item >= tl.num_programs(0))
        partial_sum = _load(grad_table, rows_of_table * D_QK, accumulated, D_QK, QK_PADDED)
        partial_sum = tl.dot(tl.trans(products), queries, partial_sum, input_precision=PRECISION)
        _store(grad_table, rows_of_table * D_QK, rows_of_table < ROWS_H + ROWS_W, partial_sum, D_QK, QK_PADDED)
        tl.debug_barrier()  # other threads load this for the next tile


@triton.jit
def _key_step(
    keys, values, queries, grads, scores, row_lse, row_delta, grad_keys, grad_values, PRECISION: tl.constexpr
):
    """Accumulate the gradients of keys and values over a tile of queries; scores are (N, M)."""
    weights = tl.exp2(scores - row_lse[None, :])
    grad_values = tl.dot(weights.to(grads.dtype), grads, grad_values, input_precision=PRECISION)
    grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    grad_scores = (weights * (grad_weights - row_delta[None, :])).to(queries.dtype)
    grad_keys = tl.dot(grad_scores, queries, grad_keys, input_precision=PRECISION)
    return grad_keys, grad_values


@_autotune(
    [
        _config(8, registers=128, TILE_H=8, TILE_W=8, BLOCK_M=32),
        _config(4, TILE_H=8, TILE_W=8, BLOCK_M=32),
        _config(2, TILE_H=4, TILE_W=8, BLOCK_M=32),
        _config(4, TILE_H=4, TILE_W=8, BLOCK_M=32),
        _config(2, TILE_H=4, TILE_W=8, BLOCK_M=16),
        _config(1, TILE_H=4, TILE_W=4, BLOCK_M=16),
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
@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def backward_keys(
    q, k, v, table, lse, grad, delta, grad_k, grad_v, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, k_image, k_head, k_y, k_x, v_image, v_head, v_y, v_x,
    grad_image, grad_head, grad_y, grad_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, PRECISION: tl.constexpr, TUNED: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, TILE_PADDED: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values.

    One program: a rectangle of the map of one head. The blocks whose windows overlap it form a rectangle too. Tiles are
    offset by the lower right halo, which minimizes their number: 4 instead of 9 if tile and block have the same size.
    """
    BELOW: tl.constexpr = WINDOW_H - TOP - BLOCK
    RIGHT: tl.constexpr = WINDOW_W - LEFT - BLOCK
    LEAD_Y: tl.constexpr = (TILE_H - BELOW % TILE_H) % TILE_H
    LEAD_X: tl.constexpr = (TILE_W - RIGHT % TILE_W) % TILE_W
    tiles_y = tl.cdiv(height + LEAD_Y, TILE_H)
    tiles_x = tl.cdiv(width + LEAD_X, TILE_W)
    image, tile_y, tile_x, _, head = _decompose_index(tl.program_id(0), tiles_y, tiles_x, 1, heads)
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
    position_dtype: tl.constexpr = tl.float32 if keys.dtype == tl.float32 or not SPLIT else tl.bfloat16
    selector = tl.trans(_rel_selector(n // TILE_W, n % TILE_W, TILE_H, TILE_PADDED, position_dtype))
    TILES: tl.constexpr = (QUERIES * QUERIES + BLOCK_M - 1) // BLOCK_M
    across = (end_column - column) * TILES
    q += image * q_image + head * q_head
    grad += image * grad_image + head * grad_head
    lse += (image * heads + head) * query_height * query_width
    delta += (image * heads + head) * query_height * query_width
    for visit in range(0, (end_row - row) * across):
        block_y = row + visit // across
        block_x = column + visit % across // TILES
        i, j, query_y, query_x, valid = _query_tile(
            block_y, block_x, visit % TILES, query_height, query_width, QUERIES, BLOCK_M
        )
        queries = _load(q, query_y * q_y + query_x * q_x, valid, D_QK, QK_PADDED)
        grads = _load(grad, query_y * grad_y + query_x * grad_x, valid, D_V, V_PADDED)
        row_lse = tl.load(lse + query_y * query_width + query_x, mask=valid, other=float("inf"))
        row_delta = tl.load(delta + query_y * query_width + query_x, mask=valid, other=0.0)

        # Position of the tile in the window of this block, possibly outside. Only table rows from there on are needed.
        r = first_y - block_y * BLOCK + TOP
        c = first_x - block_x * BLOCK + LEFT
        t = tl.arange(0, SPAN)
        is_row = t < REACH_H
        t = tl.where(is_row, t + r, t - REACH_H + c)
        in_table = (t >= 0) & (t < tl.where(is_row, ROWS_H, ROWS_W))
        positions = _load(table, tl.where(is_row, t, t + ROWS_H) * D_QK, in_table, D_QK, QK_PADDED)
        products = tl.dot(positions, tl.trans(queries), input_precision=PRECISION)
        index = tl.arange(0, TILE_PADDED)[:, None]
        rel_logits = (
            tl.gather(products, _rel_index(index, i[None, :], j[None, :], TILE_H, REACH_H, QUERIES, SPAN), 0) * LOG2E
        )
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
        if position_dtype == tl.float32:
            scores = tl.dot(selector, rel_logits, scores, input_precision=PRECISION)
        else:
            high, low = _split(rel_logits)
            scores = tl.dot(selector, low, tl.dot(selector, high, scores))
        r += n // TILE_W
        c += n % TILE_W
        covered = inside & (r >= 0) & (r < WINDOW_H) & (c >= 0) & (c < WINDOW_W)
        scores = tl.where(covered[:, None], scores, MASKED)
        grad_keys, grad_values = _key_step(
            keys, values, queries, grads, scores, row_lse, row_delta, grad_keys, grad_values, PRECISION
        )

    pixel = (image * height + y) * width + x
    _store(grad_k + head * D_QK, pixel * heads * D_QK, inside, grad_keys * scale, D_QK, QK_PADDED)
    _store(grad_v + head * D_V, pixel * heads * D_V, inside, grad_values, D_V, V_PADDED)


@triton.jit(do_not_specialize=DYNAMIC_SIZES)
def backward_extra(
    q, extra_k, extra_v, lse, grad, delta, grad_extra_k, grad_extra_v, scale,
    images, height, width, query_height, query_width, rows, columns, heads,
    q_image, q_head, q_y, q_x, grad_image, grad_head, grad_y, grad_x,
    D_QK: tl.constexpr, D_V: tl.constexpr, QK_PADDED: tl.constexpr, V_PADDED: tl.constexpr, EXTRA: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of extra keys and values. One program: a tile of those of one block and head."""
    image, row, column, tile, head = _decompose_index(
        tl.program_id(0), rows, columns, tl.cdiv(EXTRA, EXTRA_TILE), heads
    )
    e = tile * EXTRA_TILE + tl.arange(0, EXTRA_TILE)
    block = ((image * heads + head) * rows + row) * columns + column
    keys = _load(extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, D_QK, QK_PADDED)
    values = _load(extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, D_V, V_PADDED)
    grad_keys = tl.zeros([EXTRA_TILE, QK_PADDED], tl.float32)
    grad_values = tl.zeros([EXTRA_TILE, V_PADDED], tl.float32)
    query_offset = (image * heads + head) * query_height * query_width
    for query_tile in range(0, tl.cdiv(QUERIES * QUERIES, EXTRA_QUERIES)):
        _, _, y, x, valid = _query_tile(row, column, query_tile, query_height, query_width, QUERIES, EXTRA_QUERIES)
        queries = _load(q + image * q_image + head * q_head, y * q_y + x * q_x, valid, D_QK, QK_PADDED)
        grads = _load(grad + image * grad_image + head * grad_head, y * grad_y + x * grad_x, valid, D_V, V_PADDED)
        row_lse = tl.load(lse + query_offset + y * query_width + x, mask=valid, other=float("inf"))
        row_delta = tl.load(delta + query_offset + y * query_width + x, mask=valid, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where((e < EXTRA)[:, None], scores, MASKED)
        grad_keys, grad_values = _key_step(
            keys, values, queries, grads, scores, row_lse, row_delta, grad_keys, grad_values, PRECISION
        )
    _store(grad_extra_k + block * (EXTRA * D_QK), e * D_QK, e < EXTRA, grad_keys * scale, D_QK, QK_PADDED)
    _store(grad_extra_v + block * (EXTRA * D_V), e * D_V, e < EXTRA, grad_values, D_V, V_PADDED)
