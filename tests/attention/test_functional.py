"""All backends against the reference and finite differences; invalid arguments.

HALODET_ATTENTION_SETTINGS sets the number of random settings (14).
"""

import functools
import os
import random

from halodet.attention import blocked, halo_attention
from halodet.attention.functional import BACKENDS, BORDERS
from halodet.attention.layout import BlockLayout
from halodet.attention.reference import attend
from halodet.attention.unfold import attend_windows

import pytest
import torch

# Triton does not support float64; see test_triton_ops.py.
EXACT = sorted(set(BACKENDS) - {"triton"})
FAST = sorted(set(EXACT) - {"reference"})
SETTINGS = int(os.environ.get("HALODET_ATTENTION_SETTINGS", "14"))


def make(batch, heads, depth, value_depth, height, width, block, halo, stride=1, seed=0, extra=0):
    """Return q, k, v, rel_h, rel_w and, if ``extra``, extra keys and values; ``halo`` is an int or one per side."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    top, bottom, left, right = halo if isinstance(halo, tuple) else (halo,) * 4
    tensors = [
        normal(batch, heads, depth, -(-height // stride), -(-width // stride)),
        normal(batch, heads, depth, height, width),
        normal(batch, heads, value_depth, height, width),
        normal(2 * (top + block + bottom) - 1, depth),
        normal(2 * (left + block + right) - 1, depth),
    ]
    if extra:
        blocks = (batch, heads, -(-height // block), -(-width // block), extra)
        tensors += [normal(*blocks, depth), normal(*blocks, value_depth)]
    return tensors


def call(tensors, **options):
    """Call halo_attention with the last two of seven tensors as extra keys and values."""
    return halo_attention(*tensors[:5], **dict(zip(("extra_k", "extra_v"), tensors[5:], strict=False)), **options)


def assert_near(actual, expected, tolerance):
    """Assert a maximum difference of ``tolerance`` times the maximum value (at least 1)."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def weigh(out, seed):
    """Return the sum of ``out`` times random weights."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).sum()


# For each block size, one row of blocks is added; up to size 4, and at 8, they fit exactly.
SIZES = [(5, 7), (1, 1), (1, 9), (3, 2), (11, 6)]
BLOCKS = [(4, 1, 1), (4, 2, 2), (2, 3, 1), (2, 1, 2), (3, 0, 1), (8, 3, 2), (1, 2, 1), (5, 1, 1)]


@functools.cache
def results(backend, border, block, halo, stride, size, seed):
    """Return the output and all gradients; cached, as the reference is slow and serves several backends."""
    arguments = make(2, 2, 3, 4, *size, block, halo, stride, seed)
    options = {"block_size": block, "halo_size": halo, "border": border, "stride": stride}
    out = halo_attention(*arguments, **options, backend=backend)
    return [out.detach(), *torch.autograd.grad(weigh(out, seed), arguments)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("block", "halo", "stride"), BLOCKS)
def test_backend_equals_reference(backend, border, block, halo, stride):
    for seed, (height, width) in enumerate([*SIZES, (block, min(2 * block, 8))]):
        case = (border, block, halo, stride, (height, width), seed)
        expected, actual = results("reference", *case), results(backend, *case)
        assert actual[0].shape == (2, 2, 4, -(-height // stride), -(-width // stride))
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
        for a, e in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def draw_case(seed):
    """Draw random tensors and options for a map of up to 70 × 70 pixels."""
    pick = random.Random(seed)
    stride = pick.choice([1, 1, 2])
    block = pick.choice([1, 2, 3, 4, 5, 7, 8, 12, 14, 32] if stride == 1 else [2, 4, 8, 14])
    halo = pick.choice([pick.randint(0, 4), tuple(pick.randint(0, 5) for _ in range(4))])
    tensors = make(
        pick.choice([1, 2]), pick.choice([1, 3]), pick.choice([1, 3, 8]), pick.choice([2, 5]),
        pick.randint(1, 70), pick.randint(1, 70),
        block, halo, stride, seed, extra=pick.choice([0, 0, 3]),
    )  # fmt: skip
    return tensors, {
        "block_size": block,
        "halo_size": halo,
        "border": pick.choice(BORDERS),
        "stride": stride,
        "scale": pick.choice([None, 0.3]),
    }


@functools.cache
def expect_random_case(seed):
    """Return a few places and the reference's output and gradients there; cached for the other backends."""
    tensors, options = draw_case(seed)
    halo = options["halo_size"] if isinstance(options["halo_size"], tuple) else (options["halo_size"],) * 4
    scale = options["scale"] or tensors[0].shape[2] ** -0.5
    layout = BlockLayout(
        *tensors[1].shape[-2:], options["block_size"], *halo, options["stride"], options["border"] == "mask", scale
    )
    pick = random.Random(seed)
    height, width = tensors[0].shape[-2:]
    places = [(0, 0), (height - 1, width - 1), *((pick.randrange(height), pick.randrange(width)) for _ in range(4))]
    extra = tensors[5:] or [None, None]
    out = torch.stack([attend(*tensors[:5], *extra, layout, *place) for place in places], -1)
    return places, out.detach(), torch.autograd.grad(weigh(out, seed), tensors)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("seed", range(SETTINGS))
def test_random_cases_equal_reference(backend, seed):
    """Outputs and gradients of a few queries, with all options mixed."""
    tensors, options = draw_case(seed)
    out = call(tensors, **options, backend=backend)
    assert out.shape[-2:] == tensors[0].shape[-2:]
    places, expected, gradients = expect_random_case(seed)
    actual = torch.stack([out[..., y, x] for y, x in places], -1)
    assert_near(actual, expected, 1e-12)
    for a, e in zip(torch.autograd.grad(weigh(actual, seed), tensors), gradients, strict=True):
        assert_near(a, e, 1e-12)
    out = call([x.detach().float() for x in tensors], **options, backend=backend)
    assert_near(torch.stack([out[..., y, x] for y, x in places], -1).double(), expected, 1e-5)


@pytest.mark.parametrize("seed", range(SETTINGS))
def test_form_for_compiled_training_equals_the_exported_form(seed):
    tensors, options = draw_case(seed)
    halo = options["halo_size"] if isinstance(options["halo_size"], tuple) else (options["halo_size"],) * 4
    extra = tensors[5:] or [None, None]
    size = [*tensors[1].shape[-2:], options["block_size"], list(halo), options["stride"], options["border"] == "mask"]
    exported, training = (attend_windows(*tensors[:5], *extra, *size, 0.3, 1, form) for form in (False, True))
    assert_near(training, exported, 1e-12)
    gradients = [torch.autograd.grad(weigh(out, seed), tensors) for out in (exported, training)]
    for a, e in zip(*gradients, strict=True):
        assert_near(a, e, 1e-12)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(
    ("border", "halo", "stride", "extra"),
    [("zero", 1, 1, 0), ("mask", 1, 1, 0), ("mask", (1, 0, 2, 1), 2, 2), ("zero", (0, 1, 1, 0), 2, 1)],
)
def test_gradients_by_finite_differences(backend, border, halo, stride, extra):
    tensors = make(1, 1, 2, 3, 3, 5, block=2, halo=halo, stride=stride, extra=extra)
    options = {"block_size": 2, "halo_size": halo, "border": border, "stride": stride, "backend": backend}
    # Along one random direction for the reference: it is slow, and PyTorch differentiates it.
    fast = backend == "reference"
    assert torch.autograd.gradcheck(lambda *a: call(a, **options), tensors, eps=1e-6, atol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("backend", EXACT)
def test_border_zero_takes_part_in_the_softmax_and_mask_does_not(backend):
    # Uniform attention over ones. Masked: every weight falls on a one. Zeros: the window of a corner block has 5×5 ones
    # of 7×7 keys (map 6×6, block 3, halo 2).
    q = torch.zeros(1, 1, 2, 6, 6, dtype=torch.float64)
    v = torch.ones(1, 1, 1, 6, 6, dtype=torch.float64)
    table = torch.zeros(13, 2, dtype=torch.float64)
    options = {"block_size": 3, "halo_size": 2, "backend": backend}
    masked = halo_attention(q, q, v, table, table, border="mask", **options)
    zero = halo_attention(q, q, v, table, table, border="zero", **options)
    torch.testing.assert_close(masked, torch.ones_like(masked))
    torch.testing.assert_close(zero[0, 0, 0, 0, 0], torch.tensor((5 / 7) ** 2, dtype=torch.float64))


def test_padding_of_the_last_block_is_outside_the_map():
    """With border zero, a map that the block size does not divide equals the same map padded with zeros."""
    q, k, v, rel_h, rel_w = make(1, 2, 3, 3, 6, 10, block=4, halo=2)
    options = {"block_size": 4, "halo_size": 2, "border": "zero"}
    small = halo_attention(q, k, v, rel_h, rel_w, **options)
    grown = [torch.nn.functional.pad(x, (0, 6, 0, 6)) for x in (q, k, v)]
    torch.testing.assert_close(halo_attention(*grown, rel_h, rel_w, **options)[..., :6, :10], small)
    # One block of zeros before it, so that the outside on the left and above becomes inside.
    grown = [torch.nn.functional.pad(x, (4, 2, 4, 2)) for x in (q, k, v)]
    torch.testing.assert_close(halo_attention(*grown, rel_h, rel_w, **options)[..., 4:10, 4:14], small)


def test_scale_defaults_to_inverse_root_of_depth_and_excludes_positions():
    q, k, v, rel_h, rel_w = make(1, 1, 4, 2, 4, 4, block=4, halo=1)
    options = {"block_size": 4, "halo_size": 1, "border": "mask"}
    default = halo_attention(q, k, v, rel_h, rel_w, **options)
    torch.testing.assert_close(default, halo_attention(q, k, v, rel_h, rel_w, scale=0.5, **options))
    torch.testing.assert_close(default, halo_attention(q, k * 0.5, v, rel_h, rel_w, scale=1.0, **options))
    assert not torch.allclose(default, halo_attention(q * 0.5, k, v, rel_h, rel_w, scale=1.0, **options))


def test_images_of_a_batch_do_not_mix():
    q, k, v, rel_h, rel_w = make(3, 2, 3, 3, 7, 9, block=4, halo=2)
    options = {"block_size": 4, "halo_size": 2, "border": "mask"}
    together = halo_attention(q, k, v, rel_h, rel_w, **options)
    for image in range(3):
        alone = halo_attention(*(x[image : image + 1] for x in (q, k, v)), rel_h, rel_w, **options)
        torch.testing.assert_close(together[image : image + 1], alone)


def test_bfloat16_stays_near_float32():
    arguments = [x.detach().float() for x in make(1, 2, 8, 8, 13, 9, block=4, halo=2)]
    options = {"block_size": 4, "halo_size": 2, "border": "mask"}
    exact = halo_attention(*arguments, **options)
    half = halo_attention(*(x.bfloat16() for x in arguments), **options)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("kept", [0, blocked.KEPT_BYTES["cpu"]], ids=["recomputed", "kept"])
@pytest.mark.parametrize("budget", [1, 40_000])
def test_chunk_size_and_kept_weights_do_not_change_the_result(budget, kept, monkeypatch):
    """One block at a time and an uneven number of rows at a time equal one chunk."""
    arguments = make(2, 2, 3, 4, 23, 9, block=4, halo=2)
    extra = [torch.randn(2, 2, 6, 3, 5, d, dtype=torch.float64, requires_grad=True) for d in (3, 4)]
    options = {"block_size": 4, "halo_size": 2, "border": "mask", "backend": "blocked"}

    def run():
        out = halo_attention(*arguments, extra_k=extra[0], extra_v=extra[1], **options)
        return [out, *torch.autograd.grad(out.sin().sum(), [*arguments, *extra])]

    at_once = run()
    monkeypatch.setitem(blocked.CHUNK_BYTES, "cpu", budget)
    monkeypatch.setitem(blocked.KEPT_BYTES, "cpu", kept)
    for actual, expected in zip(run(), at_once, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [0, blocked.KEPT_BYTES["cpu"]], ids=["recomputed", "kept"])
def test_weights_are_kept_below_the_limit_only(kept, monkeypatch):
    """Without them, the graph holds seven arguments; with them, one tensor more for each chunk."""
    monkeypatch.setitem(blocked.KEPT_BYTES, "cpu", kept)
    arguments = make(1, 1, 2, 2, 8, 8, block=4, halo=0)
    out = halo_attention(*arguments, block_size=4, halo_size=0, border="zero", backend="blocked")
    weights = [x for x in out.grad_fn.saved_tensors if x is not None and x.shape == (4, 16, 16)]
    assert len(weights) == (1 if kept else 0)
    assert len(out.grad_fn.saved_tensors) == 7 + len(weights)


def test_maps_in_any_memory_format():
    arguments = make(1, 2, 3, 4, 7, 9, block=4, halo=2)
    options = {"block_size": 4, "halo_size": 2, "border": "mask", "backend": "blocked"}
    last = [
        x.detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2).requires_grad_() for x in arguments[:3]
    ] + arguments[3:]
    for a, b in zip(
        torch.autograd.grad(halo_attention(*arguments, **options).sin().sum(), arguments),
        torch.autograd.grad(halo_attention(*last, **options).sin().sum(), last),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_double_backward_raises():
    arguments = make(1, 1, 2, 2, 4, 4, block=2, halo=1)
    out = halo_attention(*arguments, block_size=2, halo_size=1, border="mask", backend="blocked")
    (first,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_traced_models_contain_plain_operators():
    arguments = [x.detach() for x in make(1, 1, 2, 2, 6, 5, block=4, halo=1)]

    def attend(*a):
        return halo_attention(*a, block_size=4, halo_size=1, border="mask")

    traced = torch.jit.trace(attend, tuple(arguments))
    assert "PythonOp" not in str(traced.graph) and "softmax" in str(traced.graph)
    torch.testing.assert_close(traced(*arguments), attend(*arguments))


INVALID_OPTIONS = {
    "block": ({"block_size": 0}, "block_size=0"),
    "block of stride": ({"block_size": 3, "stride": 2}, "block_size=3"),
    "halo": ({"halo_size": -1}, "halo_size=-1"),
    "stride": ({"stride": 3}, "stride=3"),
    "border": ({"border": "reflect"}, "border='reflect'"),
    "backend": ({"backend": "cuda"}, "backend='cuda'"),
    "halo of a side": ({"halo_size": (1, 1, -2, 1)}, r"halo_size=\(1, 1, -2, 1\)"),
    "halo of two sides": ({"halo_size": (1, 1)}, r"halo_size=\(1, 1\)"),
    "table": ({"halo_size": 2}, r"rel_h .*\(11, 3\).*\(15, 3\)"),
}


@pytest.mark.parametrize("case", INVALID_OPTIONS)
def test_invalid_options_raise_with_their_values(case):
    change, message = INVALID_OPTIONS[case]
    options = {"block_size": 4, "halo_size": 1, "border": "zero", **change}
    with pytest.raises(ValueError, match=message):
        halo_attention(*make(1, 2, 3, 3, 8, 8, block=4, halo=1), **options)


def test_invalid_tensors_raise_with_their_values():
    options = {"block_size": 4, "halo_size": 1, "border": "zero"}
    good = [x.detach() for x in make(1, 2, 3, 3, 8, 8, block=4, halo=1)]
    for index, bad, message in (
        (0, good[0][..., :4], "^q "),
        (1, good[1][0], "^k "),
        (2, good[2][..., :5], "^v "),
        (1, good[1][..., :0], "^k "),
        (2, good[2].long(), "^v .*int64"),
        (3, good[3].to("meta"), "^rel_h .*meta"),
        (2, good[2].float(), "^v .*float32.*float64"),
        (2, good[2].to(torch.complex64), "^v .*complex64"),
        (1, good[1][:0], "^k "),
        (1, good[1][..., :0, :], "^k "),
        (4, good[4][1:], r"^rel_w .*\(10, 3\).*\(11, 3\)"),
        (0, good[0].cpu()[:, :1], "^q "),
    ):
        with pytest.raises(ValueError, match=message):
            halo_attention(*good[:index], bad, *good[index + 1 :], **options)


def test_half_precision_on_the_cpu_raises():
    tensors = [x.detach().half() for x in make(1, 2, 3, 3, 8, 8, block=4, halo=1)]
    with pytest.raises(ValueError, match="float16"):
        halo_attention(*tensors, block_size=4, halo_size=1, border="mask")


def test_extra_keys_without_values_or_for_other_blocks_raise():
    *tensors, extra_k, extra_v = make(1, 2, 3, 4, 9, 8, block=4, halo=1, extra=2)
    options = {"block_size": 4, "halo_size": 1, "border": "mask"}
    with pytest.raises(ValueError, match="extra_k and extra_v"):
        halo_attention(*tensors, **options, extra_k=extra_k)
    with pytest.raises(ValueError, match=r"extra_k .*\(1, 2, 2, 2, 2, 3\).*\(1, 2, 3, 2, 2, 3\)"):
        halo_attention(*tensors, **options, extra_k=extra_k[:, :, :2], extra_v=extra_v)
    with pytest.raises(ValueError, match="extra_v"):
        halo_attention(*tensors, **options, extra_k=extra_k, extra_v=extra_v[0])


@pytest.mark.parametrize("backend", FAST)
def test_large_logits_and_windows_mostly_outside_stay_finite(backend):
    tensors = [(x * 300).detach().float().requires_grad_() for x in make(1, 1, 4, 4, 2, 3, block=8, halo=4)]
    out = call(tensors, block_size=8, halo_size=4, border="mask", backend=backend)
    for x in (out, *torch.autograd.grad(out.sum(), tensors)):
        assert x.isfinite().all()
