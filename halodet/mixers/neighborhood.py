"""Neighborhood attention: each pixel attends to the k x k pixels around it."""

from typing import NamedTuple

from halodet.mixers.checks import check_heads, check_integer, check_kernel_size
from halodet.mixers.halo import average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.utils.exporting import channels_last

import torch
from torch import Tensor, nn

_BLOCK = 8  # pixels; larger blocks have more masked keys, smaller ones smaller matrix products


@register_mixer("neighborhood")
class NeighborhoodMixer(Mixer):
    """Attention of each pixel to exactly k x k pixels, with a learned bias for each offset and head.

    At the border the neighborhood moves inward instead of becoming smaller. With a dilation of r, the pixels of a
    neighborhood are r apart, and the rule holds among the pixels whose coordinates have the same remainder. On a map
    of fewer than k * r pixels in a direction, first the dilation and then the neighborhood is reduced.

    Blocks of queries attend to the window of all their neighbors, with a mask. This takes about four times the
    multiply-adds of the definition, but in matrix products.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads; divides both numbers of channels.
        kernel_size: side of the neighborhood in pixels, odd.
        dilation: distance of the neighborhood's pixels.

    Raises:
        ValueError: the heads do not divide the channels, ``kernel_size`` is even, or ``dilation`` is not positive.

    Source: Hassani et al., Neighborhood Attention Transformer (arXiv 2204.07143), and Hassani and Shi, Dilated
    Neighborhood Attention Transformer (arXiv 2209.15001).
    """

    is_attention = True

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 8,
        kernel_size: int = 7,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        check_heads(num_heads, channels, value_channels)
        check_kernel_size(kernel_size)
        check_integer("dilation", dilation)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.kernel_size, self.dilation, self.channels = kernel_size, dilation, channels
        self.qkv = nn.Conv2d(channels, 2 * channels + value_channels, 1)
        self.bias = nn.Parameter(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "NeighborhoodMixer":
        options = spec.read_options(kernel_size=7, dilation=1)
        return cls(spec.channels, spec.value_channels, stride=spec.stride, num_heads=spec.num_heads, **options)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        nn.init.zeros_(self.qkv.get_parameter("bias"))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"bias"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride)), in channels last format."""
        rows = partition(x.shape[2], self.kernel_size, self.dilation, x.device)
        columns = partition(x.shape[3], self.kernel_size, self.dilation, x.device)
        parts = (
            self.qkv(channels_last(x)).permute(0, 2, 3, 1).split((self.channels, self.channels, self.out_channels), 3)
        )
        q = self._gather(parts[0] * (self.channels // self.num_heads) ** -0.5, rows.queries, columns.queries)
        k, v = (self._gather(part, rows.keys, columns.keys) for part in parts[1:])
        logits = torch.matmul(q, k.transpose(-1, -2))
        # In place: these are the largest tensors, and allocating them takes longer than adding to them.
        logits += self._bias_of_block(rows.keys.shape[1], rows.queries.shape[1]).to(logits.dtype)
        mask = rows.mask[:, None, :, None, :, None] + columns.mask[:, None, :, None, :]
        logits += mask.flatten(4).flatten(2, 3).flatten(0, 1).to(logits.dtype)
        weights = logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
        out = torch.matmul(weights, v).unflatten(3, (rows.queries.shape[1], -1))
        out = out.unflatten(2, (rows.queries.shape[0], -1))  # (B, heads, rows, columns, block, block, d)
        out = out.permute(0, 2, 4, 3, 5, 1, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        out = out.index_select(1, rows.places).index_select(2, columns.places).permute(0, 3, 1, 2)
        return average_2x2(out) if self.stride == 2 else out

    def _gather(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Gather pixels of each block: (B, H, W, C) -> (B, heads, blocks, pixels, C / heads)."""
        x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
        x = x.unflatten(3, (self.num_heads, -1)).unflatten(2, columns.shape).unflatten(1, rows.shape)
        return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)

    def _bias_of_block(self, window: int, block: int) -> Tensor:
        """Return the bias of each query and key of a block (heads, 1, block * block, window * window)."""
        place = torch.arange(window, device=self.bias.device) - torch.arange(block, device=self.bias.device).unsqueeze(
            1
        )
        # Offsets beyond the table are masked.
        row = (place + self.kernel_size - 1 - self.kernel_size // 2).clamp(0, 2 * self.kernel_size - 2).flatten()
        bias = self.bias.index_select(1, row).index_select(2, row).view(-1, block, window, block, window)
        return bias.permute(0, 1, 3, 2, 4).reshape(-1, 1, block**2, window**2)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kernel={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"


class Blocks(NamedTuple):
    """Blocks of queries on a line, and the places around each that contain the neighbors of its queries."""

    queries: Tensor  # (blocks, block): places
    keys: Tensor  # (blocks, window): places; any one where there is none
    mask: Tensor  # (blocks, block, window): 0 for the neighbors of a query, -inf for other keys
    places: Tensor  # (size,): index of each place in the flattened queries


def partition(size: int, kernel_size: int, dilation: int, device: torch.device) -> Blocks:
    """Divide a line into blocks of places whose coordinates have the same remainder.

    A block's window reaches half a neighborhood beyond it, also at the border: there it covers the neighborhoods that
    are moved inward. The last block of a remainder overlaps the one before it.

    Args:
        size: number of places.
        kernel_size: number of neighbors, odd; fewer on a line with fewer places.
        dilation: distance of neighbors; smaller on a line of fewer than ``kernel_size * dilation`` places.
        device: device of the result.
    """
    if dilation > 1:
        fitting = size // kernel_size
        # While tracing, sizes are tensors; min and max would bind the graph to this one.
        dilation = fitting.clamp(1, dilation) if isinstance(fitting, Tensor) else max(1, min(dilation, fitting))
    reach, block = kernel_size // 2, max(_BLOCK, kernel_size // 2 + 1)
    blocks = ((size - 1) // dilation) // block + 1  # of each remainder
    number = torch.arange(dilation * blocks, device=device)
    remainder = number // blocks
    count = ((size - 1 - remainder) // dilation + 1).unsqueeze(1)  # of places with this remainder
    start = torch.minimum(number.unsqueeze(1) % blocks * block, (count - block).clamp(min=0))
    queries = start + torch.arange(block, device=device)
    keys = start - reach + torch.arange(block + 2 * reach, device=device)
    first = torch.minimum((queries - reach).clamp(min=0), (count - kernel_size).clamp(min=0)).unsqueeze(2)
    distance = keys.unsqueeze(1) - first
    outside = (distance < 0) | (distance >= kernel_size) | (keys >= count).unsqueeze(1)
    mask = torch.zeros(outside.shape, device=device).masked_fill(outside, float("-inf"))
    queries, keys = (
        torch.minimum(index.clamp(min=0), count - 1) * dilation + remainder.unsqueeze(1) for index in (queries, keys)
    )
    place = torch.arange(size, device=device)
    index = place // dilation
    # A remainder with one place less may have one block less: its last block is there twice.
    number = place % dilation * blocks + index // block
    return Blocks(queries, keys, mask, number * block + index - start[:, 0][number])
