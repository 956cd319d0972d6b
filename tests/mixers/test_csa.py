"""CsaMixer against its definition, one patch and tap at a time."""

from halodet.mixers import CsaMixer

import pytest
import torch
import torch.nn.functional as F


def make(seed, **options):
    torch.manual_seed(seed)
    mixer = CsaMixer(6, 8, **{"num_heads": 2, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map of stride 1."""
    height, width = x.shape[-2:]
    heads, depth = mixer.num_heads, mixer.out_channels // mixer.num_heads
    out = torch.zeros(heads, depth, height, width, dtype=x.dtype)

    def inside(y, z):
        return 0 <= y < height and 0 <= z < width

    for y in range(0, height, 2):
        for z in range(0, width, 2):
            pooled = x[0, :, y : y + 2, z : z + 2].mean((1, 2))
            logits = (mixer.logits.weight[:, :, 0, 0] @ pooled).view(heads, 9, 9) * depth**-0.5
            places = [(y + i - 1, z + j - 1) for i in range(3) for j in range(3)]
            values = [
                mixer.values[:, :, tap // 3, tap % 3] @ x[0, :, i, j]
                if inside(i, j)
                else torch.zeros(mixer.out_channels, dtype=x.dtype)
                for tap, (i, j) in enumerate(places)
            ]
            for head in range(heads):
                for target, (i, j) in enumerate(places):
                    weights = logits[head, target].softmax(0)
                    for weight, value in zip(weights, values, strict=True):
                        if inside(i, j):
                            out[head, :, i, j] += weight * value.view(heads, depth)[head]
    return out.view(1, -1, height, width)


@pytest.mark.parametrize("size", [(4, 6), (5, 4), (4, 5), (5, 3), (1, 1), (1, 4), (2, 1)])
def test_equals_the_definition(size):
    mixer = make(0)
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    mixer = make(1)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in mixer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_equals_unfolding_mixing_and_folding(size):
    mixer = make(2, num_heads=4)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        patches = F.unfold(x, 3, padding=1, stride=2).view(2, 6, 9, -1)
        values = torch.einsum("ocj,bcjn->bojn", mixer.values.flatten(2), patches).view(2, 4, 2, 9, -1)
        logits = mixer.logits(F.avg_pool2d(x, 2, ceil_mode=True)) * 2**-0.5
        mixed = torch.einsum("bhijn,bhdjn->bhdin", logits.view(2, 4, 9, 9, -1).softmax(3), values)
        folded = F.fold(mixed.reshape(2, 72, -1), size, 3, padding=1, stride=2)
        torch.testing.assert_close(mixer(x), folded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_equal_weights_are_a_convolution_and_its_mean_over_the_patch(size):
    mixer = make(3)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        mixer.logits.weight.zero_()
        convolved = F.conv2d(x, mixer.values, stride=2, padding=1)
        box = torch.full((8, 1, 3, 3), 1 / 9, dtype=torch.float64)
        spread = F.conv_transpose2d(convolved, box, stride=2, padding=1, output_padding=1, groups=8)
        torch.testing.assert_close(mixer(x), spread[..., : size[0], : size[1]], rtol=1e-12, atol=1e-12)


def test_identical_weights_keep_each_pixel_as_often_as_patches_cover_it():
    mixer = make(4)
    x = torch.ones(1, 6, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        mixer.logits.weight.view(2, 9, 9, 6)[:] = 1000 * torch.eye(9, dtype=torch.float64)[..., None]
        mixer.values.copy_(mixer.values[:, :, :1, :1].expand_as(mixer.values))
        covered = torch.tensor([1.0, 2, 1, 2, 1], dtype=torch.float64)[:, None] * torch.tensor([1.0, 2, 1, 2, 1, 1])
        projected = mixer.values[:, :, 0, 0].sum(1)[:, None, None]
        torch.testing.assert_close(mixer(x)[0], projected * covered, rtol=1e-12, atol=1e-12)


def test_stride_2_averages_the_output_of_stride_1():
    x = torch.randn(1, 6, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(make(5, stride=2)(x), F.avg_pool2d(make(5)(x), 2))


@pytest.mark.parametrize("heads", [0, 3, 2.0])
def test_heads_that_do_not_divide_the_channels_are_named(heads):
    with pytest.raises(ValueError, match=f"num_heads={heads} is invalid"):
        CsaMixer(6, 8, num_heads=heads)


def test_parameters_are_those_of_the_specification():
    """9 C^2 + 81 C per head, without the output projection of C^2."""
    assert sum(p.numel() for p in CsaMixer(64, 64, num_heads=2).parameters()) == 9 * 64**2 + 81 * 2 * 64
