"""Local and global attention in parallel, in the spirit of PLG-ViT."""

from halodet.mixers.checks import check_heads, check_integer
from halodet.mixers.halo import HaloMixer, average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer

import torch
from torch import Tensor, nn


@register_mixer("plg")
class PlgMixer(Mixer):
    """Local and global attention in parallel: one half of the heads each.

    In the spirit of PLG-ViT (Ebert et al., Sensors 2023, 23(7):3447; light version arXiv 2307.09120), which runs window
    attention and global attention in parallel; the details are halodet's own. The local half is halo attention. In the
    global half, all pixels attend to a pooled grid of fixed size: the sum of the average and the maximum of each of
    its cells, without a position term. Both halves read all input channels, and their outputs are concatenated.

    Args:
        channels: number of input channels.
        value_channels: number of output channels.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of heads, even; divides both numbers of channels.
        block_size: side of a block in pixels.
        halo_size: width of the halo around a block in pixels.
        grid_size: side of the pooled grid in cells.
        border: ``"zero"`` or ``"mask"``, see :func:`halodet.attention.halo_attention`.
        backend: attention backend, see :func:`halodet.attention.halo_attention`.

    Raises:
        ValueError: the heads do not divide the channels or are odd, or a size, border or backend is invalid.
    """

    is_attention = True

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        grid_size: int = 7,
        border: str = "mask",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(num_heads, channels, value_channels)
        if num_heads % 2:
            raise ValueError(f"num_heads={num_heads} is invalid: expected an even number")
        check_integer("grid_size", grid_size)
        self.out_channels, self.stride, self.grid_size = value_channels, stride, grid_size
        self.num_heads, self.qk_channels = num_heads // 2, channels // 2
        self.local = HaloMixer(
            channels,
            value_channels // 2,
            num_heads=self.num_heads,
            block_size=block_size,
            halo_size=halo_size,
            border=border,
            qk_channels=self.qk_channels,
            backend=backend,
        )
        self.q = nn.Conv2d(channels, self.qk_channels, 1, bias=False)
        self.kv = nn.Conv2d(channels, self.qk_channels + value_channels // 2, 1, bias=False)
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "PlgMixer":
        return cls(
            spec.channels,
            spec.value_channels,
            stride=spec.stride,
            num_heads=spec.num_heads,
            block_size=spec.block_size,
            halo_size=spec.halo_size,
            border=spec.border,
            backend=spec.backend,
            **spec.read_options(grid_size=7),
        )

    def reset_parameters(self) -> None:
        self.local.reset_parameters()
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride))."""
        out = torch.cat([self.local(x), self._attend_to_grid(x)], 1)
        return average_2x2(out) if self.stride == 2 else out

    def _attend_to_grid(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels / 2, H, W)."""
        batch, _, height, width = x.shape
        mean, highest = pool_grid(x, self.grid_size)
        k, v = self.kv(mean + highest).split((self.qk_channels, self.out_channels // 2), 1)
        q, k, v = (part.reshape(batch, self.num_heads, -1, part.shape[2] * part.shape[3]) for part in (self.q(x), k, v))
        logits = torch.matmul(k.transpose(2, 3) * k.shape[2] ** -0.5, q)
        weights = logits.softmax(2, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
        return torch.matmul(v, weights).reshape(batch, -1, height, width)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads} local and {self.num_heads} global, grid={self.grid_size}, stride={self.stride}"


def pool_grid(x: Tensor, grid_size: int) -> tuple[Tensor, Tensor]:
    """Return averages and maxima (B, C, grid, grid) of maps (B, C, H, W), over the cells of PyTorch's adaptive pooling.

    That pooling has no counterpart in ONNX, and its gradients on a GPU are not deterministic.
    """
    shares, highest = [], x
    for dim in (2, 3):
        size = x.shape[dim]
        first, last = grid_cells(size, grid_size, x.device)
        pixel = torch.arange(size, device=x.device)
        inside = ((pixel >= first) & (pixel <= last)).to(x.dtype)
        shares.append(inside / inside.sum(1, keepdim=True))
        # Cells overlap and differ in size by a pixel: read as many as the largest has, repeating the last one.
        pixels = torch.minimum(first + torch.arange((size - 1) // grid_size + 2, device=x.device), last)
        highest = highest.index_select(dim, pixels.flatten()).unflatten(dim, (grid_size, -1)).amax(dim + 1)
    return torch.matmul(torch.matmul(shares[0], x), shares[1].t()), highest


def grid_cells(size: int, grid_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and the last pixel (grid, 1) of each cell of a grid in one direction."""
    cells = torch.arange(grid_size, device=device).unsqueeze(1)
    return cells * size // grid_size, ((cells + 1) * size - 1) // grid_size
