"""The straightforward forms compute what the mixers compute."""

from halodet.benchmark.plain_operators import PLAIN_OPERATORS
from halodet.mixers import MIXERS, MixerSpec, build_mixer

import pytest
import torch

OPTIONS = {
    "blockwise": [{"block_size": 4, "halo_size": 2}, {"block_size": 3, "halo_size": 4, "mirrored": True}],
    "botnet": [{}, {"position": "offset"}],
    "focal": [{"block_size": 4}, {"block_size": 3, "focal_window": 0}],
    "lesa": [{}, {"binary": "global"}, {"binary": "global", "table_size": 3, "num_heads": 1}],
    "slide": [{}, {"bias_on": "keys", "kernel_size": 5}],
    "elsa": [{}, {"multiply": True, "dilation": 2, "kernel_size": 3}, {"add": False}],
    "key_only": [{}, {"scope": "local", "gate": "value"}, {"scope": "global", "gate": "sigmoid", "kernel_size": 3}],
    "neighborhood": [{}, {"dilation": 2, "kernel_size": 3}],
}


@pytest.mark.parametrize("size", [(9, 13), (2, 3)])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in sorted(MIXERS) for options in OPTIONS.get(name, [{}])]
)
def test_equals_the_mixer(name, options, size):
    torch.manual_seed(0)
    mixer = build_mixer(name, MixerSpec(16, 24, num_heads=4, block_size=4, halo_size=2, options=options)).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    ours, plain = mixer(x), PLAIN_OPERATORS[type(mixer)](mixer, x)
    torch.testing.assert_close(plain, ours, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(ours)
    inputs = [x, *mixer.parameters()]
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
