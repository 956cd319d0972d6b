"""The lambda layer: a linear function of the query per pixel, made from all pixels and from a neighborhood."""

from collections.abc import Callable

from halodet.mixers.checks import check_heads, check_integer, check_kernel_size
from halodet.mixers.halo import average_2x2
from halodet.mixers.registry import Mixer, MixerSpec, register_mixer
from halodet.mixers.tap_sum import sum_taps

import torch
from torch import Tensor, nn


@register_mixer("lambda")
class LambdaMixer(Mixer):
    """Lambda layer with a local position term. Memory is linear in the number of pixels.

    The content term sums the values of all pixels, weighted by a softmax of the keys over the pixels. The position term
    weights the neighbors of a pixel with its query's products with one learned vector per offset, without a softmax.
    All heads share keys and values. Parameter names are those of timm's ``LambdaLayer``, so that its weights load
    unchanged.

    Args:
        channels: number of input channels.
        value_channels: number of output channels; each head has all of the values.
        stride: 1 or 2; with 2 the output of stride 1 is averaged over 2x2 pixels.
        num_heads: number of queries per pixel; divides ``value_channels``.
        key_channels: number of channels of each query and key.
        kernel_size: side of the neighborhood in pixels, odd.
        norm: factory of the normalization layers of queries and values.

    Raises:
        ValueError: the heads do not divide the channels, ``kernel_size`` is even, or ``key_channels`` is not positive.

    Source: Bello, LambdaNetworks (arXiv 2102.08602); defaults, layout and initialization as in timm.
    """

    is_attention = True

    def __init__(
        self,
        channels: int,
        value_channels: int,
        *,
        stride: int = 1,
        num_heads: int = 4,
        key_channels: int = 16,
        kernel_size: int = 9,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_heads(num_heads, value_channels)
        check_integer("key_channels", key_channels)
        check_kernel_size(kernel_size)
        self.out_channels, self.stride, self.num_heads = value_channels, stride, num_heads
        self.key_channels, self.kernel_size, self.depth = key_channels, kernel_size, value_channels // num_heads
        self.qkv = nn.Conv2d(channels, num_heads * key_channels + key_channels + self.depth, 1, bias=False)
        self.norm_q, self.norm_v = norm(num_heads * key_channels), norm(self.depth)
        reach = kernel_size // 2
        self.conv_lambda = nn.Conv3d(1, key_channels, (kernel_size, kernel_size, 1), padding=(reach, reach, 0))
        self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: MixerSpec) -> "LambdaMixer":
        options = spec.read_options(num_heads=4, key_channels=16, kernel_size=9)
        return cls(spec.channels, spec.value_channels, stride=spec.stride, norm=spec.norm, **options)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=self.qkv.in_channels**-0.5)
        nn.init.trunc_normal_(self.conv_lambda.weight, std=self.key_channels**-0.5)
        nn.init.zeros_(self.conv_lambda.get_parameter("bias"))

    def no_weight_decay(self) -> set[str]:
        return {"conv_lambda.weight"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, value_channels, ceil(H / stride), ceil(W / stride))."""
        sizes = (self.num_heads * self.key_channels, self.key_channels, self.depth)
        q, k, v = self.qkv(x).split(sizes, 1)
        q, v = self.norm_q(q).unflatten(1, (self.num_heads, -1)), self.norm_v(v)
        weights = k.flatten(2).softmax(-1, dtype=torch.promote_types(k.dtype, torch.float32)).to(v.dtype)
        content = torch.einsum("bkn,bvn->bkv", weights, v.flatten(2))
        bias = self.conv_lambda.get_parameter("bias").to(q.dtype)
        # The bias of an offset's vector is added to every output of the convolution over values: a constant content.
        out = torch.einsum("bhkyx,bkv->bhvyx", q, content + bias[:, None]) + self._sum_neighbors(q, v)
        out = out.flatten(1, 2)
        return average_2x2(out) if self.stride == 2 else out

    def _sum_neighbors(self, q: Tensor, v: Tensor) -> Tensor:
        """Sum values (B, d, H, W) over the neighborhood with weights of the queries (B, heads, k, H, W).

        A convolution of all values with each of the k filters would take k * d numbers per pixel.
        """
        filters = self.conv_lambda.weight.to(q.dtype).flatten(1)
        # Not unflatten, after which an ONNX exporter takes the height and width for constants.
        weights = torch.matmul(filters.t(), q.flatten(3)).reshape(*q.shape[:2], -1, *v.shape[2:])
        return sum_taps(weights, v.unsqueeze(1), self.kernel_size)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kernel={self.kernel_size}, stride={self.stride}"
