"""FocalMixer against its definition, one query and key at a time, and against HaloMixer."""

from halodet.mixers import FocalMixer, HaloMixer

import pytest
import torch
import torch.nn.functional as F


def make(seed, **options):
    torch.manual_seed(seed)
    sizes = {"num_heads": 2, "block_size": 3, "halo_size": 1, **options}
    mixer = FocalMixer(6, 8, **sizes).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def around(at, count, window):
    """The pooled window of a block in one direction: of all that fit, the one whose center is nearest to it."""
    window = min(window, count)
    return min((range(i, i + window) for i in range(count - window + 1)), key=lambda r: abs(sum(r) / window - at))


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map of stride 1."""
    height, width = x.shape[-2:]
    heads, block, halo, focal = mixer.num_heads, mixer.block_size, mixer.halo_size, mixer.focal_window
    rows, columns = -(-height // block), -(-width // block)
    depth, window = mixer.depth, block + 2 * halo
    kv = mixer.kv.weight[:, :, 0, 0].view(heads, -1, x.shape[1])
    tokens = {}
    for i in range(rows if focal else 0):
        for j in range(columns):
            pixels = [
                (y, z)
                for y in range(i * block, min((i + 1) * block, height))
                for z in range(j * block, min((j + 1) * block, width))
            ]
            total = sum(mixer.pool_weight[y % block, z % block] * x[0, :, y, z] for y, z in pixels)
            tokens[i, j] = total * block**2 / len(pixels)
    out = torch.zeros(heads, mixer.value_depth, height, width, dtype=x.dtype)
    for h in range(heads):
        for y in range(height):
            for z in range(width):
                q = mixer.q.weight[h * depth : (h + 1) * depth, :, 0, 0] @ x[0, :, y, z]
                logits, values = [], []
                top, left = y // block * block, z // block * block
                for i in range(max(top - halo, 0), min(top + block + halo, height)):
                    for j in range(max(left - halo, 0), min(left + block + halo, width)):
                        k, v = (kv[h] @ x[0, :, i, j]).split([depth, mixer.value_depth])
                        rel = mixer.pos_embed.height_rel[window - 1 + halo + i - y]
                        rel = rel + mixer.pos_embed.width_rel[window - 1 + halo + j - z]
                        logits.append(q @ k / depth**0.5 + q @ rel)
                        values.append(v)
                for i in around(y // block, rows, focal) if focal else ():
                    for j in around(z // block, columns, focal):
                        k, v = (kv[h] @ tokens[i, j]).split([depth, mixer.value_depth])
                        rel = mixer.focal_pos.height_rel[i - y // block + focal - 1]
                        rel = rel + mixer.focal_pos.width_rel[j - z // block + focal - 1]
                        logits.append(q @ k / depth**0.5 + q @ rel)
                        values.append(v)
                out[h, :, y, z] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out.flatten(0, 1)[None]


@pytest.mark.parametrize("focal_window", [0, 1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 8), (7, 10)])
def test_equals_the_definition(focal_window, size):
    mixer = make(0, focal_window=focal_window)
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["blocked", "unfold", "reference"])
@pytest.mark.parametrize("stride", [1, 2])
def test_backends_agree_and_stride_2_is_an_average(backend, stride):
    mixer, x = make(1), torch.randn(2, 6, 7, 11, dtype=torch.float64)
    other = make(1, backend=backend, stride=stride)
    with torch.no_grad():
        expected = mixer(x) if stride == 1 else F.avg_pool2d(mixer(x), 2, ceil_mode=True)
        torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_without_pooled_keys_it_is_halo_attention_bit_for_bit(stride):
    mixer = make(2, focal_window=0, stride=stride).float()
    halo = HaloMixer(6, 8, stride=stride, num_heads=2, block_size=3, halo_size=1, border="mask")
    halo.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(2, 6, 8, 10)
    assert torch.equal(mixer(x), halo(x))


def test_a_traced_graph_takes_maps_of_any_size():
    mixer = make(6)
    x = [torch.randn(1, 6, *size, dtype=torch.float64) for size in [(9, 13), (1, 1), (2, 8), (16, 15)]]
    traced = torch.jit.trace(mixer, (x[0],), check_trace=False)
    for image in x:
        torch.testing.assert_close(traced(image), mixer(image))


def test_gradients_are_those_of_finite_differences():
    mixer = make(3)
    x = torch.randn(2, 6, 4, 7, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def changed_blocks(mixer, x, pixel):
    """Return which blocks of 3x3 pixels have an output that depends on ``pixel``."""
    other = x.clone()
    other[..., pixel[0], pixel[1]] += 1
    with torch.no_grad():
        changed = (mixer(x) - mixer(other)).abs().amax(1)
    return F.max_pool2d(changed, 3)[0] > 1e-9


def test_a_block_sees_pooled_pixels_beyond_its_halo_and_none_beyond_its_pooled_window():
    x = torch.randn(1, 6, 21, 21, dtype=torch.float64)  # 7 x 7 blocks
    focal, halo = torch.zeros(7, 7, dtype=torch.bool), torch.zeros(7, 7, dtype=torch.bool)
    focal[2:5, 2:5], halo[3, 3] = True, True
    center = 10, 10  # of block (3, 3), in no other halo
    assert torch.equal(changed_blocks(make(4), x, center), focal)
    assert torch.equal(changed_blocks(make(4, focal_window=0), x, center), halo)


def test_nothing_wraps_around_and_border_windows_move_inward():
    x = torch.randn(1, 6, 21, 18, dtype=torch.float64)
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(changed_blocks(make(5), x, (1, 1)), expected)
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[-2:, -2:] = True
    assert torch.equal(changed_blocks(make(5), x, (19, 16)), expected)
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[:4, :4] = True  # block (2, 2) is in the windows of blocks 0 (moved inward) to 3
    assert torch.equal(changed_blocks(make(5), x, (7, 7)), expected)


def test_pooling_starts_as_the_mean_of_the_pixels_that_a_block_has():
    mixer = FocalMixer(6, 8, num_heads=2, block_size=3, halo_size=1).double()
    assert mixer.pool_weight.detach() == pytest.approx(torch.full((3, 3), 1 / 9).numpy())
    constant = torch.randn(1, 6, 1, 1, dtype=torch.float64).expand(1, 6, 7, 5)
    torch.testing.assert_close(mixer._pool_blocks(constant), constant[..., :3, :2])
    x = torch.randn(1, 6, 7, 5, dtype=torch.float64)
    tokens = mixer._pool_blocks(x)
    torch.testing.assert_close(tokens[..., 0, 0], x[..., :3, :3].mean((2, 3)))
    torch.testing.assert_close(tokens[..., 2, 1], x[..., 6:, 3:].mean((2, 3)))


@pytest.mark.parametrize(
    "options",
    [{"focal_window": 2}, {"focal_window": -1}, {"num_heads": 4}, {"block_size": 0}, {"halo_size": -1}],
)
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FocalMixer(6, 8, **{"num_heads": 2, **options})


def test_pooling_and_positions_get_no_weight_decay():
    tables = {"pos_embed.height_rel", "pos_embed.width_rel"}
    assert make(0, focal_window=0).no_weight_decay() == tables
    pooled = {"pool_weight", "focal_pos.height_rel", "focal_pos.width_rel"}
    assert make(0).no_weight_decay() == tables | pooled


def test_bfloat16_gradients_of_pooling_add_up_the_pixels_of_a_large_map():
    """Regression: sums over thousands of pixels in bfloat16, which were off by half."""
    mixer = FocalMixer(4, 4, num_heads=2)
    x = torch.rand(1, 4, 200, 334).bfloat16()
    (actual,) = torch.autograd.grad(mixer._pool_blocks(x).float().sum(), mixer.pool_weight)
    (expected,) = torch.autograd.grad(mixer.double()._pool_blocks(x.double()).sum(), mixer.pool_weight)
    torch.testing.assert_close(actual.double(), expected, rtol=0.01, atol=0)
