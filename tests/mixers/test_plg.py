"""PlgMixer against its definition: halo attention beside attention to a pooled grid."""

from halodet.mixers import HaloMixer, PlgMixer
from halodet.mixers.plg import pool_grid

import pytest
import torch
import torch.nn.functional as F


def make(seed, **options):
    torch.manual_seed(seed)
    sizes = {"num_heads": 4, "block_size": 4, "halo_size": 1, "grid_size": 3, **options}
    mixer = PlgMixer(8, 12, **sizes).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map of stride 1."""
    height, width = x.shape[-2:]
    grid, heads, depth = mixer.grid_size, mixer.num_heads, mixer.local.depth
    value_depth = mixer.local.value_depth
    tokens = []
    for i in range(grid):
        for j in range(grid):
            rows = slice(i * height // grid, -(-(i + 1) * height // grid))
            columns = slice(j * width // grid, -(-(j + 1) * width // grid))
            cell = x[0, :, rows, columns].flatten(1)
            tokens.append(cell.mean(1) + cell.amax(1))
    keys, values = (mixer.kv.weight[:, :, 0, 0] @ torch.stack(tokens, 1)).split([heads * depth, heads * value_depth])
    out = torch.zeros(heads, value_depth, height, width, dtype=x.dtype)
    for h in range(heads):
        k, v = keys[h * depth : (h + 1) * depth], values[h * value_depth : (h + 1) * value_depth]
        for y in range(height):
            for z in range(width):
                q = mixer.q.weight[h * depth : (h + 1) * depth, :, 0, 0] @ x[0, :, y, z]
                out[h, :, y, z] = v @ (q @ k / depth**0.5).softmax(0)
    return torch.cat([mixer.local(x), out.flatten(0, 1)[None]], 1)


@pytest.mark.parametrize("grid_size", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (6, 9), (11, 8)])
def test_equals_the_definition(grid_size, size):
    mixer = make(0, grid_size=grid_size)
    x = torch.randn(1, 8, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_the_first_half_is_halo_attention(border):
    mixer = make(1, border=border)
    halo = HaloMixer(8, 6, num_heads=2, block_size=4, halo_size=1, border=border, qk_channels=4).double()
    halo.load_state_dict(mixer.local.state_dict())
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    assert torch.equal(mixer(x)[:, :6], halo(x))


def test_a_pixel_changes_its_window_in_the_first_half_and_the_map_in_the_second():
    mixer, x = make(2), torch.randn(1, 8, 12, 12, dtype=torch.float64)
    other = x.clone()
    other[..., 1, 1] += 1
    with torch.no_grad():
        changed = (mixer(x) - mixer(other)).abs() > 1e-9
    assert changed[:, :6].any(1).nonzero()[:, 1:].max() == 3  # the block of 4 x 4 pixels
    assert changed[:, 6:].any(1).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 14), (13, 22), (25, 42)])
@pytest.mark.parametrize("grid_size", [1, 2, 7])
def test_the_grid_is_adaptive_pooling_with_its_gradients(size, grid_size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pooled = pool_grid(x, grid_size)
    expected = F.adaptive_avg_pool2d(x, grid_size), F.adaptive_max_pool2d(x, grid_size)
    for ours, theirs in zip(pooled, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (ours, theirs))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_stride_2_is_an_average():
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(make(3, stride=2)(x), F.avg_pool2d(make(3)(x), 2, ceil_mode=True))


def test_a_traced_graph_takes_maps_of_any_size():
    mixer = make(6)
    x = [torch.randn(1, 8, *size, dtype=torch.float64) for size in [(9, 13), (1, 1), (2, 8), (16, 15)]]
    traced = torch.jit.trace(mixer, (x[0],), check_trace=False)
    for image in x:
        torch.testing.assert_close(traced(image), mixer(image))


def test_gradients_are_those_of_finite_differences():
    mixer = make(4)
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "options",
    [{"num_heads": 1}, {"num_heads": 3}, {"grid_size": 0}, {"block_size": 0}, {"border": "wrap"}, {"backend": "fast"}],
)
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        PlgMixer(8, 12, **{"num_heads": 4, **options})
