"""ExternalAttention against its definition, and the identities of attention to a memory."""

from halodet.mixers import ConvMixer, ExternalAttention, ExternalMixer

import pytest
import torch


def make(seed=0, **options):
    torch.manual_seed(seed)
    attention = ExternalAttention(6, **{"slots": 5, **options}).double()
    torch.nn.init.normal_(attention.memory_v)
    return attention


def reference(attention, x):
    """Read the memory, one slot and pixel at a time."""
    batch, channels, height, width = x.shape
    slots, pixels = attention.memory_k.shape[0], height * width
    out = torch.zeros_like(x)
    for b in range(batch):
        flat = x[b].reshape(channels, pixels)
        weights = torch.zeros(slots, pixels, dtype=x.dtype)
        for s in range(slots):
            logits = torch.stack([attention.memory_k[s] @ flat[:, n] for n in range(pixels)])
            powers = (logits - logits.max()).exp()
            weights[s] = powers / powers.sum()
        for n in range(pixels):
            share = weights[:, n] / (weights[:, n].sum() + 1e-9)
            out[b, :, n // width, n % width] = sum(share[s] * attention.memory_v[s] for s in range(slots))
    return out


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (5, 2)])
def test_equals_the_definition(size):
    attention = make()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attention.attend(x), reference(attention, x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    attention = make().eval()
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_permuted_pixels_permute_the_output_and_images_are_independent():
    attention = make().eval()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    order = torch.randperm(20)
    permuted = attention(x.flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(permuted.flatten(2), attention(x).flatten(2)[..., order])
    torch.testing.assert_close(attention(x[:1]), attention(x)[:1])


def test_the_convolution_comes_first():
    mixer = ExternalMixer(6, stride=2, slots=4).eval()
    x = torch.randn(1, 6, 7, 5)
    torch.testing.assert_close(mixer(x), mixer.attention(mixer.conv(x)))
    plain = ConvMixer(6, stride=2)
    plain.load_state_dict(mixer.state_dict(), strict=False)
    torch.nn.init.zeros_(mixer.attention.norm.weight)
    torch.testing.assert_close(mixer(x), plain(x))


def test_memories_start_equal_and_get_no_weight_decay():
    mixer = ExternalMixer(6)
    memory_k, memory_v = mixer.attention.memory_k, mixer.attention.memory_v
    assert torch.equal(memory_k, memory_v) and memory_k.data_ptr() != memory_v.data_ptr()
    assert mixer.attention.no_weight_decay() == {"memory_k", "memory_v"}
    with pytest.raises(ValueError, match="slots=0"):
        ExternalAttention(6, slots=0)
