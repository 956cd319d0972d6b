"""SlideMixer against its definition, and against its two convolutions without merging."""

from halodet.mixers import SlideMixer

import pytest
import torch
import torch.nn.functional as F


def make(seed, **options):
    torch.manual_seed(seed)
    mixer = SlideMixer(6, 8, **{"num_heads": 2, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map of stride 1."""
    height, width = x.shape[-2:]
    size, heads, depth = mixer.kernel_size, mixer.num_heads, mixer.out_channels // mixer.num_heads
    offsets = [(i - size // 2, j - size // 2) for i in range(size) for j in range(size)]
    projected = torch.einsum("oc,chw->ohw", mixer.qkv.weight[:, :, 0, 0], x[0]) + mixer.qkv.bias[:, None, None]
    out = torch.zeros(heads, depth, height, width, dtype=x.dtype)

    def at(part, y, z):
        return part[:, y, z] if 0 <= y < height and 0 <= z < width else torch.zeros(depth, dtype=x.dtype)

    def gather(part, y, z, tap):
        """The pixel at the offset of the tap, a bias, and the sum of the learned kernel over all offsets."""
        total = at(part, y + offsets[tap][0], z + offsets[tap][1]) + mixer.gather_bias[:, tap]
        for pixel, (dy, dz) in enumerate(offsets):
            total = total + mixer.deformed[:, tap, pixel // size, pixel % size] * at(part, y + dy, z + dz)
        return total

    for head in range(heads):
        q, k, v = projected[3 * depth * head : 3 * depth * (head + 1)].split(depth)
        for y in range(height):
            for z in range(width):
                query, logits = q[:, y, z] * depth**-0.5, []
                for tap in range(size**2):
                    key, bias = gather(k, y, z, tap), mixer.position_bias[head, tap]
                    logits.append(query @ (key + bias) if mixer.bias_on == "keys" else query @ key + bias)
                weights = torch.stack(logits).softmax(0)
                out[head, :, y, z] = sum(weights[tap] * gather(v, y, z, tap) for tap in range(size**2))
    return out.view(1, -1, height, width)


def attend_to_gathered(mixer, x, *convolutions):
    """Compute the output of stride 1 from all k * k keys and values, which are the sum of the convolutions."""
    depth, taps = mixer.out_channels // mixer.num_heads, mixer.kernel_size**2
    q, k, v = mixer.qkv(x).unflatten(1, (mixer.num_heads, 3, depth)).unbind(2)

    def gather(part):
        part = part.flatten(0, 1)
        total = sum(F.conv2d(part, *args, padding=mixer.kernel_size // 2, groups=depth) for args in convolutions)
        return total.view(len(x), mixer.num_heads, depth, taps, *x.shape[-2:])

    logits = torch.einsum("bhdyx,bhdjyx->bhjyx", q * depth**-0.5, gather(k)) + mixer.position_bias[..., None, None]
    return torch.einsum("bhjyx,bhdjyx->bhdyx", logits.softmax(2), gather(v)).flatten(1, 2)


@pytest.mark.parametrize("bias_on", ["logits", "keys"])
@pytest.mark.parametrize(("kernel", "size"), [(3, (4, 5)), (3, (1, 1)), (3, (2, 6)), (5, (3, 4)), (1, (2, 2))])
def test_equals_the_definition(bias_on, kernel, size):
    mixer = make(0, kernel_size=kernel, bias_on=bias_on)
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias_on", ["logits", "keys"])
def test_gradients_are_those_of_finite_differences(bias_on):
    mixer = make(1, bias_on=bias_on)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in mixer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *mixer.parameters()), fast_mode=True)


@pytest.mark.parametrize("kernel", [3, 5])
def test_merging_the_fixed_and_the_learned_convolution_changes_nothing(kernel):
    mixer = make(2, kernel_size=kernel)
    depth, taps = mixer.gather_bias.shape
    one_hot = torch.zeros(depth, taps, kernel, kernel, dtype=torch.float64)
    for tap in range(taps):
        one_hot[:, tap, tap // kernel, tap % kernel] = 1
    bias = mixer.gather_bias.flatten()
    two = [(one_hot.view(-1, 1, kernel, kernel), bias), (mixer.deformed.view(-1, 1, kernel, kernel), None)]
    one = [(mixer.merged_kernel().view(-1, 1, kernel, kernel), bias)]
    x = torch.randn(2, 6, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        for convolutions in (two, one):
            torch.testing.assert_close(mixer(x), attend_to_gathered(mixer, x, *convolutions), rtol=1e-12, atol=1e-12)


def test_a_new_mixer_attends_to_the_pixels_themselves():
    mixer = SlideMixer(6, 8, num_heads=2).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    q, k, v = mixer.qkv(x).unflatten(1, (2, 3, 4)).unbind(2)
    keys, values = (F.unfold(part.flatten(1, 2), 3, padding=1).view(2, 2, 4, 9, 5, 7) for part in (k, v))
    logits = torch.einsum("bhdyx,bhdjyx->bhjyx", q * 0.5, keys) + mixer.position_bias[..., None, None]
    plain = torch.einsum("bhjyx,bhdjyx->bhdyx", logits.softmax(2), values).flatten(1, 2)
    torch.testing.assert_close(mixer(x), plain, rtol=1e-12, atol=1e-12)


def test_equal_logits_are_a_box_filter_and_the_mean_of_the_learned_kernels():
    mixer = make(3)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        mixer.qkv.weight.unflatten(0, (2, 3, 4))[:, 0] = 0
        mixer.qkv.bias.unflatten(0, (2, 3, 4))[:, 0] = 0
        mixer.position_bias.fill_(0.3)
        v = mixer.qkv(x).unflatten(1, (2, 3, 4))[:, :, 2].flatten(1, 2)
        mean = mixer.deformed.mean(1).repeat(2, 1, 1).unsqueeze(1)
        learned = F.conv2d(v, mean, mixer.gather_bias.mean(1).repeat(2), padding=1, groups=8)
        torch.testing.assert_close(mixer(x), F.avg_pool2d(v, 3, 1, 1) + learned, rtol=1e-12, atol=1e-12)


def test_a_pixel_matters_only_in_its_neighborhood():
    mixer = make(4)
    x = torch.randn(1, 6, 7, 7, dtype=torch.float64)
    changed = x.clone()
    changed[..., 3, 3] += 1
    differs = (mixer(x) - mixer(changed)).abs().sum(1)[0] > 0
    assert differs[2:5, 2:5].all() and differs.sum() == 9


def test_stride_2_averages_the_output_of_stride_1():
    x = torch.randn(1, 6, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(make(5, stride=2)(x), F.avg_pool2d(make(5)(x), 2))


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"num_heads": 3}, {"num_heads": 0}, {"bias_on": "values"}])
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        SlideMixer(6, 8, **{"num_heads": 2, **options})


def test_biases_get_no_weight_decay_and_the_fixed_kernel_is_no_weight():
    mixer = make(6)
    assert mixer.no_weight_decay() == {"gather_bias", "position_bias"}
    assert set(mixer.state_dict()) == {"qkv.weight", "qkv.bias", "deformed", "gather_bias", "position_bias"}
