"""Locally enhanced self-attention (LESA)."""

from collections.abc import Callable, Mapping
from typing import Any

from halodet.attention.unfold import block_positions, crop_blocks, gather_blocks
from halodet.mixers.checks import check_block, check_choice, check_integer
from halodet.mixers.halo import RelativePosition, average_2x2
from halodet.mixers.memory import warn_memory
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.utils.exporting import is_exporting

import torch
from torch import Tensor, nn

BINARIES = ("global", "halo")
GLOBAL_TABLE_SIZE = 128  # pixels: no offset on res4 of an image of 1333 x 2048 is beyond it


@register_mixer("lesa")
class LesaMixer(Mixer):
    """Sum of a convolution (the unary term) and gated attention (the binary term).

    The unary term is a grouped 3x3 convolution, a 1x1 convolution and a normalization layer. In the binary term, the
    logits are not scaled: one normalization layer normalizes the products of queries and keys, and those of queries and
    relative positions, before they are added. It has one channel per head and kind of product. Statistics cover only
    pairs of pixels inside the map, and pixels outside it are excluded from the softmax. The gate is computed from both
    terms. All normalization layers are inside; none has to follow.

    The global binary term compares all pairs of pixels, in memory that grows with the square of their number. The one
    with a halo compares each pixel with its block and the halo around it.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads, and of groups of the 3x3 convolution. Queries and keys have ``channels / 2``
            channels over all heads.
        binary: ``"halo"`` or ``"global"``.
        block_size: side of a block in pixels.
        halo_size: width of the halo around a block in pixels.
        table_size: largest offset in the relative position tables, plus 1; offsets beyond it take the last row. The
            default is ``block_size + halo_size`` with a halo, which covers all offsets, and 128 without.
        norm: factory of normalization layers. Batch norms in training, group and instance norms compute statistics over
            the pairs inside the map; others must be functions of each value or of each position's channels.

    Raises:
        ValueError: the heads do not divide the channels, ``binary`` is unknown, or a size is invalid.

    Source: Yang et al., Locally Enhanced Self-Attention (arXiv 2107.05637), with the relative positions of its
    detection models. The halo, and maps of any size, are additions.
    """

    is_attention = True
    rel_pos_tables = ("pos_embed.height_rel", "pos_embed.width_rel")

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 8,
        binary: str = "halo",
        block_size: int = 8,
        halo_size: int = 3,
        table_size: int | None = None,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_integer("num_heads", num_heads)
        if channels % (2 * num_heads) or value_channels % num_heads:
            raise ValueError(
                f"num_heads={num_heads} is invalid: expected a divisor of half of the {channels} input channels and of "
                f"the {value_channels} output channels"
            )
        check_choice("binary", binary, BINARIES)
        check_block(block_size, halo_size)
        if table_size is None:
            table_size = block_size + halo_size if binary == "halo" else GLOBAL_TABLE_SIZE
        check_integer("table_size", table_size)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.binary, self.block_size, self.halo_size, self.table_size = binary, block_size, halo_size, table_size
        self.depth, self.value_depth = channels // (2 * num_heads), value_channels // num_heads

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=False)

        # With one group the 3x3 convolution already mixes all channels.
        local = [nn.Conv2d(channels, value_channels, 3, padding=1, bias=False)]
        if num_heads > 1:
            grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=num_heads, bias=False)
            local = [grouped, conv(channels, value_channels)]
        self.unary = nn.Sequential(*local, norm(value_channels))
        qkv_channels = channels + value_channels
        self.qkv = nn.Sequential(conv(channels, qkv_channels), norm(qkv_channels))
        self.pos_embed = RelativePosition(table_size, table_size, self.depth)
        self.norm_logits = norm(2 * num_heads)
        self.norm_binary = norm(value_channels)
        self.gate = nn.Sequential(
            nn.ReLU(),
            conv(2 * value_channels, value_channels),
            norm(value_channels),
            nn.ReLU(),
            conv(value_channels, value_channels),
            norm(value_channels),
            nn.Sigmoid(),
        )
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "LesaMixer":
        options = spec.read_options(
            num_heads=8, binary="halo", block_size=spec.block_size, halo_size=spec.halo_size, table_size=None
        )
        return cls(spec.channels, spec.value_channels, stride=spec.stride, norm=spec.norm, **options)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        self.pos_embed.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride))."""
        batch, _, height, width = x.shape
        qkv = self.qkv(x).reshape(batch, self.num_heads, -1, height, width)
        q, k, v = qkv.split((self.depth, self.depth, self.value_depth), 2)
        attended = self._attend_blocks(q, k, v) if self.binary == "halo" else self._attend_map(q, k, v)
        unary, binary = self.unary(x), self.norm_binary(attended.flatten(1, 2))
        out = unary + self.gate(torch.cat((unary, binary), 1)) * binary
        return average_2x2(out) if self.stride == 2 else out

    def _attend_map(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from all pixels to all pixels: (B, heads, d, H, W) -> (B, heads, d_v, H, W)."""
        height, width = q.shape[-2:]
        if not torch.jit.is_tracing():  # sizes are tensors while tracing
            weights = q.shape[0] * self.num_heads * (height * width) ** 2 * q.element_size()
            # Measured peaks in multiples of the weights, the larger ones with a backward pass. The softmax is float32.
            training, inference = (8, 4) if q.element_size() >= 4 else (12, 6)
            warn_memory(
                "mixer lesa with binary='global'", (training if torch.is_grad_enabled() else inference) * weights
            )
        queries, keys, values = (x.permute(0, 1, 3, 4, 2)[:, :, None, None] for x in (q, k, v))
        out = self._attend(queries, keys, values, 0, None, None)
        return out.reshape(*out.shape[:2], height, width, self.value_depth).permute(0, 1, 4, 2, 3)

    def _attend_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from each block to its window: (B, heads, d, H, W) -> (B, heads, d_v, H, W)."""
        (height, width), block, halo = q.shape[-2:], self.block_size, self.halo_size
        rows: Any = (height - 1) // block + 1  # symbolic while exporting
        columns: Any = (width - 1) // block + 1
        if is_exporting():  # as halodet.attention.unfold: the graph would be bound to one block, or to several
            rows, columns = torch.sym_max(rows, 2), torch.sym_max(columns, 2)
        window = block + 2 * halo
        query_y, key_y = block_positions(rows, height, block, block, halo, window, q.device)
        query_x, key_x = block_positions(columns, width, block, block, halo, window, q.device)
        inside_y, inside_x = (key_y >= 0) & (key_y < height), (key_x >= 0) & (key_x < width)
        valid_y = (query_y < height).unsqueeze(2) & inside_y.unsqueeze(1)  # (rows, queries, keys)
        valid_x = (query_x < width).unsqueeze(2) & inside_x.unsqueeze(1)
        key_y, key_x = key_y.clamp(0, height - 1), key_x.clamp(0, width - 1)
        out = self._attend(
            gather_blocks(q, query_y.clamp(max=height - 1), query_x.clamp(max=width - 1)),
            gather_blocks(k, key_y, key_x),
            gather_blocks(v, key_y, key_x),
            halo,
            inside_y[:, None, :, None] & inside_x[:, None, :],
            valid_y[:, None, :, None, :, None] & valid_x[:, None, :, None, :],
        )
        out = out.reshape(*out.shape[:2], rows, columns, block, block, self.value_depth)
        return crop_blocks(out, height, width)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, halo: int, inside: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        """Attend from the queries of each block to the keys of its window.

        Args:
            queries: queries (B, heads, rows, columns, h, w, d).
            keys: keys (B, heads, rows, columns, h + 2 * halo, w + 2 * halo, d).
            values: values (B, heads, rows, columns, h + 2 * halo, w + 2 * halo, d_v).
            halo: number of keys before the first query in each direction.
            inside: which keys are inside the map (rows, columns, h + 2 * halo, w + 2 * halo); None for all.
            valid: which pairs are of a query and a key inside the map
                (rows, columns, h, w, h + 2 * halo, w + 2 * halo); None for all.

        Returns:
            Output (B, heads, rows, columns, h * w, d_v).
        """
        scale = _scale_of(self.norm_logits)
        if scale is None:
            # Nested calls, so that no tensor of logits stays longer than it is needed.
            stacked = torch.cat(self._logits(queries, queries, keys, halo), 1)
            logits = torch.add(*self._normalize(stacked, valid).chunk(2, 1))
        else:
            # The shift of each head does not change the softmax, and the factor is cheaper on the queries.
            factors = scale.to(queries.dtype).view(2, 1, -1, 1, 1, 1, 1, 1)
            logits = torch.add(*self._logits(queries * factors[0], queries * factors[1], keys, halo))
        if inside is not None:
            logits = logits.masked_fill(~inside.flatten(-2).unsqueeze(-2), float("-inf"))
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return torch.matmul(weights.to(values.dtype), values.flatten(-3, -2))

    def _logits(self, queries: Tensor, position: Tensor, keys: Tensor, halo: int) -> tuple[Tensor, Tensor]:
        """Return the logits of content and of position (B, heads, rows, columns, queries, keys).

        ``position`` are the queries of the relative positions.
        """
        rel_h = self._table_rows(self.pos_embed.height_rel, queries.shape[4], keys.shape[4], halo).to(queries.dtype)
        rel_w = self._table_rows(self.pos_embed.width_rel, queries.shape[5], keys.shape[5], halo).to(queries.dtype)
        along_h = torch.einsum("bnyxijd,ikd->bnyxijk", position, rel_h)
        along_w = torch.einsum("bnyxijd,jkd->bnyxijk", position, rel_w)
        content = torch.matmul(queries.flatten(-3, -2), keys.flatten(-3, -2).transpose(-1, -2))
        return content, (along_h.unsqueeze(-1) + along_w.unsqueeze(-2)).flatten(-2).flatten(-3, -2)

    def _table_rows(self, table: Tensor, queries: int, keys: int, halo: int) -> Tensor:
        """Return the table's row for each query and key in one direction (queries, keys, d)."""
        query, key = torch.arange(queries, device=table.device), torch.arange(keys, device=table.device)
        last = self.table_size - 1
        return table[(key - halo - query.unsqueeze(1)).clamp(-last, last) + last]

    def _normalize(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        """Normalize logits (B, 2 * heads, rows, columns, queries, keys); those that are not valid may become 0."""
        # A meta tensor has a shape only; which pairs are valid is unknown, and nothing depends on it.
        if valid is None or valid.is_meta or not _computes_statistics(self.norm_logits):
            return self.norm_logits(logits.flatten(2, 4)).view(logits.shape)
        index, flat = valid.flatten().nonzero().squeeze(1), logits.flatten(2)
        normalized = self.norm_logits(flat.index_select(2, index).unsqueeze(3)).squeeze(3)
        return torch.zeros_like(flat, dtype=normalized.dtype).index_copy(2, index, normalized).view(logits.shape)

    def extra_repr(self) -> str:
        sizes = f"block={self.block_size}, halo={self.halo_size}" if self.binary == "halo" else "global"
        return f"heads={self.num_heads}, {sizes}, stride={self.stride}"

    def rel_pos_layout(self) -> dict[str, int]:
        return {"table_size": self.table_size}

    def infer_rel_pos_layout(self, rows: int, metadata: Mapping[str, Any]) -> dict[str, int]:
        return {"table_size": (rows + 1) // 2} if rows % 2 else self.rel_pos_layout()

    def resize_rel_pos(self, table: Tensor, layout: Mapping[str, int]) -> Tensor:
        """Resize a table so that every offset keeps its row; offsets that it does not have take its nearest row."""
        old, new = layout["table_size"] - 1, self.table_size - 1
        return table[(torch.arange(-new, new + 1, device=table.device).clamp(-old, old) + old)]


def _scale_of(norm: nn.Module) -> Tensor | None:
    """Return the factor of each channel of a batch norm in inference; None for other normalization layers.

    With gradients the shift of the norm must be used, though they are zero: DistributedDataParallel waits for them.
    """
    variance = getattr(norm, "running_var", None)
    if variance is None or torch.is_grad_enabled() or _computes_statistics(norm):
        return None
    scale = (variance + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight


def _computes_statistics(norm: nn.Module) -> bool:
    """Return whether a normalization layer computes statistics over positions, which must be inside the map."""
    if isinstance(norm, nn.modules.batchnorm._NormBase):
        return norm.training or norm.running_mean is None
    return isinstance(norm, nn.GroupNorm)
