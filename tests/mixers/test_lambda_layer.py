"""LambdaMixer against timm with its weights, and against its definition where timm's layer cannot be built."""

from halodet.mixers import LambdaMixer

import pytest
import torch


def make(seed=0, **options):
    torch.manual_seed(seed)
    mixer = LambdaMixer(6, 8, **{"num_heads": 2, "key_channels": 3, "kernel_size": 3, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer.eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 7), (2, 5), (1, 9)])
def test_equals_timm_with_its_weights(stride, kernel, training):
    lambda_layer = pytest.importorskip("timm.layers.lambda_layer", reason="timm is not installed")
    theirs = lambda_layer.LambdaLayer(24, 24, stride=stride, num_heads=4, dim_head=8, r=kernel).double()
    ours = LambdaMixer(24, 24, stride=stride, num_heads=4, key_channels=8, kernel_size=kernel).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 24, 10, 12, dtype=torch.float64)
    ours.train(training)
    theirs.train(training)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(ours(x))
    for a, b in zip(
        *(torch.autograd.grad((m(x) * weight).sum(), list(m.parameters())) for m in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map pixel by pixel."""
    height, width = x.shape[-2:]
    heads, depth, values = mixer.num_heads, mixer.key_channels, 8 // mixer.num_heads
    reach = mixer.kernel_size // 2
    q, k, v = mixer.qkv(x).split((heads * depth, depth, values), 1)
    q, k, v = mixer.norm_q(q)[0].view(heads, depth, height, width), k[0].flatten(1).softmax(1), mixer.norm_v(v)[0]
    out = torch.zeros(heads, values, height, width, dtype=x.dtype)
    content = sum(k[:, n, None] * v[:, n // width, n % width] for n in range(height * width))
    for y in range(height):
        for z in range(width):
            function = content + mixer.conv_lambda.bias[:, None]
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    if 0 <= y + i < height and 0 <= z + j < width:
                        filters = mixer.conv_lambda.weight[:, 0, i + reach, j + reach, 0]
                        function = function + filters[:, None] * v[:, y + i, z + j]
            for h in range(heads):
                out[h, :, y, z] = function.t() @ q[h, :, y, z]
    return out.flatten(0, 1)[None]


@pytest.mark.parametrize("size", [(4, 5), (1, 1), (2, 7)])
def test_equals_the_definition(size):
    """Other numbers of input and output channels, which timm's layer does not support."""
    mixer = make()
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


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"num_heads": 3}, {"key_channels": 0}])
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LambdaMixer(6, 8, **{"num_heads": 2, **options})
