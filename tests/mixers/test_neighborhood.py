"""NeighborhoodMixer against its definition, and its identities inside the map and on small ones."""

from halodet.mixers import NeighborhoodMixer
from halodet.mixers.neighborhood import partition

import pytest
import torch
import torch.nn.functional as F


def make(seed=0, **options):
    torch.manual_seed(seed)
    mixer = NeighborhoodMixer(6, 8, **{"num_heads": 2, "kernel_size": 3, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


def places(at, size, kernel, dilation):
    """The neighborhood of a place, by its rule: the window of its residue class that is nearest to being centered."""
    while dilation > 1 and kernel * dilation > size:
        dilation -= 1
    same = [place for place in range(size) if place % dilation == at % dilation]
    kernel = min(kernel, len(same))
    windows = [same[i : i + kernel] for i in range(len(same) - kernel + 1)]
    inside = [window for window in windows if at in window]
    return min(inside, key=lambda window: abs(sum(window) / len(window) - at))


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map pixel by pixel."""
    height, width = x.shape[-2:]
    projected = torch.einsum("oc,chw->ohw", mixer.qkv.weight[:, :, 0, 0], x[0]) + mixer.qkv.bias[:, None, None]
    q, k, v = (part.reshape(mixer.num_heads, -1, height, width) for part in projected.split((6, 6, 8)))
    out = torch.zeros_like(v)
    dilation = mixer.dilation
    steps = [
        next(d for d in range(dilation, 0, -1) if d == 1 or mixer.kernel_size * d <= size) for size in (height, width)
    ]
    for h in range(mixer.num_heads):
        for y in range(height):
            for z in range(width):
                logits, values = [], []
                for i in places(y, height, mixer.kernel_size, dilation):
                    for j in places(z, width, mixer.kernel_size, dilation):
                        row = (i - y) // steps[0] + mixer.kernel_size - 1
                        column = (j - z) // steps[1] + mixer.kernel_size - 1
                        logits.append(q[h, :, y, z] @ k[h, :, i, j] * q.shape[1] ** -0.5 + mixer.bias[h, row, column])
                        values.append(v[h, :, i, j])
                out[h, :, y, z] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out.reshape(1, -1, height, width)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 8), (1, 1), (2, 9), (3, 6), (5, 4)])
def test_equals_the_definition(dilation, size):
    mixer = make(dilation=dilation)
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    mixer = make()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 5, 19])
def test_blocks_cover_each_place_and_its_neighbors(dilation, kernel):
    for size in range(1, 60):
        blocks = partition(size, kernel, dilation, torch.device("cpu"))
        assert torch.equal(blocks.queries.flatten()[blocks.places], torch.arange(size))
        for at in range(size):
            block, query = divmod(blocks.places[at].item(), blocks.queries.shape[1])
            found = blocks.keys[block][blocks.mask[block, query] == 0].tolist()
            assert found == places(at, size, kernel, dilation)
        assert blocks.mask.isfinite().any(-1).all()  # a softmax of padding is finite


def test_inside_the_map_it_is_attention_to_the_unfolded_pixels():
    mixer = make(kernel_size=5)
    x = torch.randn(1, 6, 11, 9, dtype=torch.float64)
    q, k, v = mixer.qkv(x).split((6, 6, 8), 1)
    unfold = lambda t: F.unfold(t, 5, padding=2).view(2, -1, 25, 11, 9)  # noqa: E731
    logits = (q.view(2, 3, 1, 11, 9) * 3**-0.5 * unfold(k)).sum(1) + mixer.bias[:, 2:7, 2:7].reshape(2, 25, 1, 1)
    expected = (logits.softmax(1).unsqueeze(1) * unfold(v)).sum(2).view(1, 8, 11, 9)
    torch.testing.assert_close(mixer(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_a_neighborhood_larger_than_the_map_is_the_map():
    mixer = make(kernel_size=9)
    torch.nn.init.zeros_(mixer.bias)
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    q, k, v = (part.reshape(2, -1, 20) for part in mixer.qkv(x).split((6, 6, 8), 1))
    expected = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(mixer(x).view(2, -1, 20), expected)


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"num_heads": 4}, {"dilation": 0}])
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        NeighborhoodMixer(6, 8, **{"num_heads": 2, **options})
