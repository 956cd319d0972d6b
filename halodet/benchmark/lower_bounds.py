"""Lower bounds on the forward time of mixers in plain PyTorch.

A bound is the time of a mixer's matrix products, convolutions and softmax alone, and of one fused multiply-add per tap
of its sums over a neighborhood. Operands are in the cache but for projections and convolutions of the whole map. It has
no copies, gathers, masks, biases or norms.
"""

from __future__ import annotations

from collections.abc import Callable

from halodet.mixers import (
    BlockwiseMixer,
    BoTNetMixer,
    CsaMixer,
    ElsaMixer,
    ExternalMixer,
    FocalMixer,
    HaloMixer,
    KeyOnlyMixer,
    LambdaMixer,
    LesaMixer,
    Mixer,
    NeighborhoodMixer,
    PlgMixer,
    SlideMixer,
)
from halodet.mixers.neighborhood import partition

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 18  # numbers of the result of one operation: 1 MiB in float32


class LowerBound:
    """Operations that a mixer cannot avoid on a map ``x``, each on random operands."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.pixels = x, x.shape[0] * x.shape[2] * x.shape[3]
        self.operations: list[Callable[[], object]] = []

    @torch.no_grad()
    def run(self) -> None:
        """Run all operations."""
        for operation in self.operations:
            operation()

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.x.device, dtype=self.x.dtype)

    def _repeat(self, times: float, operation: Callable[[], object]) -> LowerBound:
        self.operations += [operation] * max(1, round(times))
        return self

    def products(self, count: float, rows: int, inner: int, columns: int) -> LowerBound:
        """Add ``count`` products (rows, inner) x (inner, columns), in chunks."""
        most = max(1, CHUNK // columns)
        if rows > most:
            count, rows = count * rows / most, most
        batch = max(1, min(round(count), CHUNK // (rows * columns)))
        a, b, out = (
            self._random(batch, rows, inner),
            self._random(batch, inner, columns),
            self._random(batch, rows, columns),
        )
        return self._repeat(count / batch, lambda: torch.bmm(a, b, out=out))

    def projection(self, inputs: int, outputs: int) -> LowerBound:
        """Add a 1x1 convolution of the map as a matrix product."""
        a, b = self._random(outputs, inputs), self._random(inputs, self.pixels)
        return self._repeat(1, lambda: torch.mm(a, b))

    def convolution(self, conv: nn.Conv2d) -> LowerBound:
        """Add a convolution of a map of the same size, without its bias."""
        x = self._random(self.x.shape[0], conv.in_channels, *self.x.shape[2:])
        return self._repeat(
            1, lambda: F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        )

    def softmax(self, rows: float, columns: int) -> LowerBound:
        """Add the softmax of each row."""
        count = max(1, min(round(rows), CHUNK // columns))
        x = self._random(count, columns)
        return self._repeat(rows / count, lambda: torch.softmax(x, -1, out=x))

    def taps(self, count: int, heads: int, channels: int) -> LowerBound:
        """Add ``count`` sums of values (heads, channels, pixels), each weighted per head and pixel."""
        length = max(1, min(self.pixels, CHUNK // (heads * channels)))
        values, out, weights = (
            *(self._random(heads, channels, length) for _ in range(2)),
            self._random(heads, 1, length),
        )
        return self._repeat(count * self.pixels / length, lambda: torch.addcmul(out, weights, values, out=out))

    def box(self, channels: int, kernel_size: int) -> LowerBound:
        """Add sums over the rows, then over the columns of a neighborhood, in the format in which they are fastest."""
        x = self._random(self.x.shape[0], *self.x.shape[2:], channels).permute(0, 3, 1, 2)
        rows, columns = ((kernel_size, 1), 1, (kernel_size // 2, 0)), ((1, kernel_size), 1, (0, kernel_size // 2))
        return self._repeat(1, lambda: F.avg_pool2d(F.avg_pool2d(x, *rows), *columns))

    def attention(self, heads: int, pairs: int, block: int, window: int, qk_depth: int, depth: int) -> LowerBound:
        """Add attention of ``pairs`` of query and key per head, in blocks of ``block`` queries and ``window`` keys."""
        count = heads * pairs / (block * window)
        self.products(count, block, qk_depth, window).softmax(count * block, window)
        return self.products(count, block, window, depth)


def _pairs(size: int, block: int, before: int, after: int) -> int:
    """Return the number of pairs of query and key in one direction, without keys outside the map."""
    starts = range(0, size, block)
    return sum(
        (min(size, start + block) - start) * (min(size, start + block + after) - max(0, start - before))
        for start in starts
    )


def _blocked(mixer: HaloMixer | BlockwiseMixer, x: Tensor, halo: tuple[int, int, int, int], qk: int) -> LowerBound:
    (batch, channels, height, width), block, heads = x.shape, mixer.block_size, mixer.num_heads
    window = (block + halo[0] + halo[1]) * (block + halo[2] + halo[3])
    pairs = batch * _pairs(height, block, *halo[:2]) * _pairs(width, block, *halo[2:])
    bound = LowerBound(x).projection(channels, 2 * qk + mixer.out_channels)
    return bound.attention(heads, pairs, block**2, window, qk // heads, mixer.out_channels // heads)


def _blockwise(mixer: BlockwiseMixer, x: Tensor) -> LowerBound:
    return _blocked(mixer, x, mixer.halo_size, mixer.channels)


def _halo(mixer: HaloMixer, x: Tensor) -> LowerBound:
    rows = (
        sum(table.shape[0] for table in (mixer.pos_embed.height_rel, mixer.pos_embed.width_rel)) // 2 + mixer.block_size
    )
    bound = _blocked(mixer, x, (mixer.halo_size,) * 4, mixer.depth * mixer.num_heads)
    return bound.products(1, bound.pixels * mixer.num_heads, mixer.depth, rows)


def _focal(mixer: FocalMixer, x: Tensor) -> LowerBound:
    block, bound = mixer.block_size, _halo(mixer, x)
    rows, columns = (-(-size // block) for size in x.shape[2:])
    pooled = min(mixer.focal_window, rows) * min(mixer.focal_window, columns)
    if not pooled:
        return bound
    pairs = x.shape[0] * rows * columns * block**2 * pooled
    return bound.attention(mixer.num_heads, pairs, block**2, pooled, mixer.depth, mixer.value_depth)


def _plg(mixer: PlgMixer, x: Tensor) -> LowerBound:
    bound, heads, cells = (
        _halo(mixer.local, x).projection(x.shape[1], mixer.qk_channels),
        mixer.num_heads,
        mixer.grid_size**2,
    )
    depths = mixer.qk_channels // heads, mixer.out_channels // 2 // heads
    return bound.attention(heads, bound.pixels * cells, 64, cells, *depths)


def _lesa(mixer: LesaMixer, x: Tensor) -> LowerBound:
    (batch, channels, height, width), heads, outputs = x.shape, mixer.num_heads, mixer.out_channels
    block, halo, sizes = mixer.block_size, mixer.halo_size, (height, width)
    if mixer.binary == "halo":
        pairs = _pairs(height, block, halo, halo) * _pairs(width, block, halo, halo)
        sizes = (2 * block + halo,) * 2
        shape = block**2, (block + 2 * halo) ** 2
    else:
        pairs, shape = (height * width) ** 2, (64, height * width)
    bound = LowerBound(x).convolution(mixer.unary.get_submodule("0")).projection(channels, channels + 2 * outputs)
    bound.attention(heads, batch * pairs, *shape, mixer.depth, mixer.value_depth)
    return bound.products(1, bound.pixels * heads, mixer.depth, sum(sizes)).projection(3 * outputs, outputs)


def _botnet(mixer: BoTNetMixer, x: Tensor) -> LowerBound:
    batch, channels, height, width = x.shape
    size, heads = height * width, mixer.num_heads
    bound = LowerBound(x).projection(channels, mixer.qkv.out_channels)
    bound.attention(heads, batch * size**2, 64, size, mixer.depth, mixer.out_channels // heads)
    return bound.products(1, bound.pixels * heads, mixer.depth, height + width)


def _elsa(mixer: ElsaMixer, x: Tensor) -> LowerBound:
    taps, depth = mixer.kernel_size**2, mixer.out_channels // mixer.num_heads
    bound = LowerBound(x).projection(x.shape[1], mixer.qkv.out_channels).convolution(mixer.products)
    bound.projection(mixer.qk_channels, mixer.logits.out_channels).softmax(bound.pixels * mixer.num_heads, taps)
    return bound.taps(taps, mixer.num_heads, depth)


def _external(mixer: ExternalMixer, x: Tensor) -> LowerBound:
    slots, channels = mixer.attention.memory_k.shape
    bound = LowerBound(x).convolution(mixer.conv)
    bound.projection(channels, 2 * channels).projection(channels, slots).projection(slots, channels)
    return bound.softmax(x.shape[0] * slots, x.shape[2] * x.shape[3])


def _key_only(mixer: KeyOnlyMixer, x: Tensor) -> LowerBound:
    heads, depth = mixer.num_heads, mixer.out_channels // mixer.num_heads
    bound = LowerBound(x).projection(x.shape[1], mixer.kv.out_channels)
    return bound.taps(1, heads, depth) if mixer.scope == "global" else bound.box(mixer.out_channels, mixer.kernel_size)


def _lambda(mixer: LambdaMixer, x: Tensor) -> LowerBound:
    heads, keys, taps = mixer.num_heads, mixer.key_channels, mixer.kernel_size**2
    bound = LowerBound(x).projection(x.shape[1], mixer.qkv.out_channels).projection(keys, mixer.depth)
    bound.projection(keys, heads * mixer.depth).products(1, bound.pixels * heads, keys, taps)
    return bound.taps(taps, heads, mixer.depth)


def _neighborhood(mixer: NeighborhoodMixer, x: Tensor) -> LowerBound:
    rows, columns = (partition(size, mixer.kernel_size, mixer.dilation, x.device) for size in x.shape[2:])
    block, window = (rows.mask.shape[i] * columns.mask.shape[i] for i in (1, 2))
    blocks, heads = len(rows.mask) * len(columns.mask), mixer.num_heads
    bound = LowerBound(x).projection(x.shape[1], mixer.qkv.out_channels)
    pairs = x.shape[0] * blocks * block * window
    return bound.attention(heads, pairs, block, window, mixer.channels // heads, mixer.out_channels // heads)


def _slide(mixer: SlideMixer, x: Tensor) -> LowerBound:
    heads, taps = mixer.num_heads, mixer.kernel_size**2
    depth = mixer.out_channels // heads
    bound = LowerBound(x).projection(x.shape[1], 3 * mixer.out_channels)
    # For each pixel of the kernel: from all channels of a head to all taps for the keys, and back for the values.
    bound.products(2 * taps * heads, taps, depth, bound.pixels).softmax(bound.pixels * heads, taps)
    return bound.taps(2 * taps, heads, depth)


def _csa(mixer: CsaMixer, x: Tensor) -> LowerBound:
    heads, depth = mixer.num_heads, mixer.out_channels // mixer.num_heads
    patches = x.shape[0] * (-(-x.shape[2] // 2)) * (-(-x.shape[3] // 2))
    bound = LowerBound(x).products(9, mixer.out_channels, x.shape[1], patches)
    bound.products(1, mixer.logits.out_channels, x.shape[1], patches).softmax(patches * heads * 9, 9)
    return bound.products(patches * heads, 9, 9, depth)


LOWER_BOUNDS: dict[type[Mixer], Callable[..., LowerBound]] = {
    BlockwiseMixer: _blockwise,
    BoTNetMixer: _botnet,
    CsaMixer: _csa,
    ElsaMixer: _elsa,
    ExternalMixer: _external,
    FocalMixer: _focal,
    HaloMixer: _halo,
    KeyOnlyMixer: _key_only,
    LambdaMixer: _lambda,
    LesaMixer: _lesa,
    NeighborhoodMixer: _neighborhood,
    PlgMixer: _plg,
    SlideMixer: _slide,
}
