"""sum_taps against unfolded values, whole and in chunks of rows."""

from halodet.mixers import tap_sum
from halodet.mixers.tap_sum import sum_taps

import pytest
import torch
import torch.nn.functional as F


def inputs(shared, size=(7, 5)):
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 9, *size, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 1 if shared else 3, 4, *size, dtype=torch.float64, requires_grad=True)
    return weights, values


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("chunk", [1, 2000, 1 << 30])
@pytest.mark.parametrize("size", [(7, 5), (1, 1)])
def test_equals_the_sum_of_unfolded_values(shared, dilation, chunk, size, monkeypatch):
    monkeypatch.setattr(tap_sum, "CHUNK_BYTES", chunk)
    weights, values = inputs(shared, size)
    unfolded = F.unfold(values.flatten(1, 2), 3, dilation, dilation).view(2, -1, 4, 9, *size)
    expected = torch.einsum("bhtyx,bhdtyx->bhdyx", weights, unfolded.expand(2, 3, 4, 9, *size))
    actual = sum_taps(weights, values, 3, dilation)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(x, (weights, values), grad) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(tap_sum, "CHUNK_BYTES", 1)
    for shared in (False, True):
        assert torch.autograd.gradcheck(lambda w, v: sum_taps(w, v, 3), inputs(shared), fast_mode=True)


def test_bfloat16_taps_add_up_in_float32():
    """The error of the sum, and of the gradient of the values, is that of one rounding (0.2 %), not of 81."""
    torch.manual_seed(0)
    weights = torch.randn(1, 2, 81, 12, 13).bfloat16().requires_grad_()
    values = torch.randn(1, 2, 4, 12, 13).bfloat16().requires_grad_()
    grad = torch.randn(1, 2, 4, 12, 13).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        out = sum_taps(weights.to(dtype), values.to(dtype), 9)
        results.append((out, torch.autograd.grad(out, values, grad.to(dtype))[0]))
    for actual, expected in zip(*results, strict=True):
        assert (actual.double() - expected.double()).norm() < 0.004 * expected.double().norm()
