"""ElsaMixer against its definition, one pixel, channel and tap at a time."""

import math

from halodet.mixers import ElsaMixer

import pytest
import torch
import torch.nn.functional as F


def make(seed, **options):
    torch.manual_seed(seed)
    mixer = ElsaMixer(6, 8, **{"num_heads": 2, "kernel_size": 3, "group_width": 2, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / 2**0.5))


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map of stride 1."""
    height, width = x.shape[-2:]
    size, dilation, heads = mixer.kernel_size, mixer.dilation, mixer.num_heads
    projected = torch.einsum("oc,chw->ohw", mixer.qkv.weight[:, :, 0, 0], x[0]) + mixer.qkv.bias[:, None, None]
    q, k, v = projected.split((mixer.qk_channels, mixer.qk_channels, mixer.out_channels))
    m, group = q * k, mixer.products.weight.shape[1]
    out = torch.zeros(mixer.out_channels, height, width, dtype=x.dtype)

    def neighbors(y, z):
        for tap in range(size**2):
            i, j = y + dilation * (tap // size - size // 2), z + dilation * (tap % size - size // 2)
            if 0 <= i < height and 0 <= j < width:
                yield tap, i, j

    for y in range(height):
        for z in range(width):
            hidden = []
            for channel in range(mixer.qk_channels):
                total = mixer.products.bias[channel].item()
                for tap, i, j in neighbors(y, z):
                    for n in range(group):
                        kernel = mixer.products.weight[channel, n, tap // size, tap % size]
                        total += (kernel * m[channel // group * group + n, i, j]).item()
                hidden.append(gelu(total))
            logits = mixer.logits.weight[:, :, 0, 0] @ torch.tensor(hidden, dtype=x.dtype) + mixer.logits.bias
            weights = logits.view(heads, size**2).softmax(1)
            for channel in range(mixer.out_channels):
                head = channel // (mixer.out_channels // heads)
                for tap, i, j in neighbors(y, z):
                    weight = weights[head, tap]
                    if mixer.ghost_multiply is not None:
                        weight = weight * mixer.ghost_multiply[channel, tap]
                    if mixer.ghost_add is not None:
                        weight = weight + mixer.ghost_add[channel, tap]
                    out[channel, y, z] += weight * v[channel, i, j]
    return out[None]


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("multiply", "add"), [(False, True), (True, True), (True, False), (False, False)])
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (2, 6)])
def test_equals_the_definition(dilation, multiply, add, size):
    mixer = make(0, dilation=dilation, multiply=multiply, add=add)
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    mixer = make(1, multiply=True)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in mixer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *mixer.parameters()), fast_mode=True)


def test_constant_logits_are_a_box_filter_and_the_added_term_a_depthwise_convolution():
    mixer = make(2)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        mixer.logits.weight.zero_()
        mixer.logits.bias.zero_()
        v = mixer.qkv(x)[:, -8:]
        box = F.avg_pool2d(v, 3, 1, 1, count_include_pad=True)
        depthwise = F.conv2d(v, mixer.ghost_add.view(8, 1, 3, 3), padding=1, groups=8)
        torch.testing.assert_close(mixer(x), box + depthwise, rtol=1e-12, atol=1e-12)


def test_shifting_the_map_shifts_the_output_away_from_the_border():
    mixer = make(3)
    x = torch.zeros(1, 6, 12, 12, dtype=torch.float64)
    x[..., 4:7, 4:7] = torch.randn(6, 3, 3, dtype=torch.float64)
    moved = mixer(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved[..., 3:10, 4:10], mixer(x).roll((1, 2), (2, 3))[..., 3:10, 4:10])


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"num_heads": 3}, {"dilation": 0}, {"group_width": 0}])
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ElsaMixer(6, 8, **{"num_heads": 2, **options})


def test_ghost_kernels_get_no_weight_decay():
    assert make(0, multiply=True).no_weight_decay() == {"ghost_multiply", "ghost_add"}
    assert make(0, add=False).no_weight_decay() == set()


def test_parameters_are_those_of_the_released_model():
    """With c = 96, 3 heads, k = 7 and groups of 4, less the output projection of 96 x 96 + 96."""
    mixer = ElsaMixer(96, 96, num_heads=3, kernel_size=7, group_width=4)
    assert sum(p.numel() for p in mixer.parameters()) == 57_907 - 96 * 96 - 96
