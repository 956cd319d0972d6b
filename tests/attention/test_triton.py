"""The Triton backend against the definition in float64; without a GPU its kernels are interpreted (see conftest.py)."""

import random
import warnings

from halodet.attention import functional as halo
from halodet.attention import halo_attention
from halodet.attention.layout import BlockLayout
from halodet.attention.triton_ops import halo_attention_triton, triton_unavailable_reason, unsupported_reason

import pytest
import torch
from torch.utils.checkpoint import checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(triton_unavailable_reason(DEVICE) is not None, reason=str(triton_unavailable_reason(DEVICE))),
]


def make(shape, batch=1, heads=1, depth=4, value_depth=4, extra=0, seed=0):
    """Arguments of a backend, in float64 but such that single precision holds them exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(DEVICE, torch.float64)

    arguments = [
        normal(batch, heads, depth, shape.query_height, shape.query_width),
        normal(batch, heads, depth, shape.height, shape.width),
        normal(batch, heads, value_depth, shape.height, shape.width),
        normal(2 * shape.window_height - 1, depth),
        normal(2 * shape.window_width - 1, depth),
    ]
    blocks = (batch, heads, shape.rows, shape.columns, extra)
    return arguments + ([normal(*blocks, depth), normal(*blocks, value_depth)] if extra else [None, None])


def geometry(height, width, block, halo, stride=1, mask=True, scale=0.5):
    return BlockLayout(
        height, width, block, *((halo,) * 4 if isinstance(halo, int) else halo), stride=stride, mask=mask, scale=scale
    )


def run(backend, arguments, shape, dtype=torch.float32):
    """The result and all gradients."""
    arguments = [None if x is None else x.detach().to(dtype).requires_grad_() for x in arguments]
    out = backend(*arguments, shape)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view(out.shape).cos()
    return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), [x for x in arguments if x is not None])]


def assert_near(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        # Where all summands cancel out, as in a table of which one row is used, their rounding remains.
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max().clamp(min=0.1)


def some_case(seed):
    choose = random.Random(seed)
    stride = choose.choice((1, 1, 2))
    block = stride * choose.randint(1, 6 // stride)
    shape = geometry(
        choose.randint(1, 11),
        choose.randint(1, 11),
        block,
        [choose.randint(0, 3) for _ in range(4)],
        stride,
        choose.random() < 0.5,
    )
    options = {"batch": choose.randint(1, 2), "heads": choose.randint(1, 2), "depth": choose.randint(1, 20)}
    return shape, make(
        shape, **options, value_depth=choose.randint(1, 20), extra=choose.choice((0, 0, 1, 3)), seed=seed
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_equal_the_definition(seed):
    shape, arguments = some_case(seed)
    assert_near(
        run(halo_attention_triton, arguments, shape),
        run(halo.halo_attention_reference, arguments, shape, torch.float64),
    )


LARGE = {
    "more queries than a tile": (geometry(15, 14, 14, 2), {"depth": 16}),
    "ragged blocks": (geometry(20, 27, 8, 3, mask=False), {"depth": 16, "value_depth": 32}),
    "halo larger than the block": (geometry(9, 7, 2, (5, 3, 4, 6)), {"heads": 2}),
    "halo on one side": (geometry(9, 11, 4, (0, 0, 7, 0), mask=False), {}),
    "more extra keys than a tile": (geometry(6, 5, 4, 1), {"extra": 18, "heads": 2}),
    "blocks larger than the map": (geometry(3, 5, 32, 1, stride=2), {}),
    "wide windows": (geometry(5, 6, 4, 20, mask=False), {}),
}


@pytest.mark.parametrize("case", LARGE)
def test_cases_beyond_one_tile_equal_plain_pytorch(case):
    shape, options = LARGE[case]
    arguments = make(shape, **options)
    assert_near(
        run(halo_attention_triton, arguments, shape), run(halo.halo_attention_blocked, arguments, shape, torch.float64)
    )


@pytest.fixture
def half_types(monkeypatch):
    """The interpreter holds bfloat16 as the integers of its bits: make its products, and its casts of integers, take them for numbers."""
    if DEVICE.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def to_single(self, x):
        return cast(self, x, tl.float32) if x.dtype == tl.bfloat16 else x

    def cast_twice(self, x, dtype):
        integer = not x.dtype.scalar.is_floating() and dtype.scalar == tl.bfloat16
        return cast(self, TensorHandle(x.data.astype("float32"), tl.float32) if integer else x, dtype)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, to_single(self, a), to_single(self, b), *rest),
    )
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_twice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [False, True])
def test_half_types_are_as_exact_as_plain_pytorch(mask, dtype, half_types):
    shape = geometry(11, 9, 4, 2, mask=mask)
    arguments = [None if x is None else x.to(dtype) for x in make(shape, heads=2, depth=16, value_depth=8, extra=2)]
    exact = run(halo.halo_attention_blocked, arguments, shape, torch.float64)
    results = (
        run(halo_attention_triton, arguments, shape, dtype),
        run(halo.halo_attention_blocked, arguments, shape, dtype),
    )
    for e, triton, blocked in zip(exact, *results, strict=True):
        assert triton.dtype == dtype
        assert (triton.double() - e).norm() <= 2 * (blocked.double() - e).norm()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_logits_stay_finite(mask, sign):
    # All keys of a corner block's first tile are masked. Where all logits are far below 0, anything left in their place would stand out.
    shape = geometry(5, 6, 4, (3, 3, 70, 3), mask=mask)
    arguments = make(shape, extra=1)
    q, k, _, rel_h, rel_w, extra_k, _ = arguments
    for x, mean in ((q, 100 * sign), (k, 2), (rel_h, 0.5), (rel_w, 0.5), (extra_k, 2)):
        x += mean
    exact = run(halo.halo_attention_blocked, arguments, shape, torch.float64)
    assert_near(run(halo_attention_triton, arguments, shape), exact, 1e-3)


def test_every_run_gives_the_same_bits():
    shape, arguments = some_case(3)
    for first, second in zip(
        run(halo_attention_triton, arguments, shape), run(halo_attention_triton, arguments, shape), strict=True
    ):
        assert torch.equal(first, second)


def test_maps_in_any_memory_format():
    shape = geometry(7, 6, 4, 2)
    arguments = [None if x is None else x.float() for x in make(shape, batch=2, heads=2)]
    expected = run(halo_attention_triton, arguments, shape)
    # as views of one channels-last tensor, as a projection gives them
    together = torch.cat([x.flatten(1, 2) for x in arguments[:3]], 1).contiguous(memory_format=torch.channels_last)
    maps = [x.unflatten(1, (2, 4)) for x in together.chunk(3, 1)]
    assert maps[0].stride(2) == 1 and not maps[0].is_contiguous()
    out = halo_attention_triton(*maps, *arguments[3:], shape)
    assert torch.equal(out, expected[0])
    assert out.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
    together.requires_grad_()
    out = halo_attention_triton(*[x.unflatten(1, (2, 4)) for x in together.chunk(3, 1)], *arguments[3:], shape)
    # a gradient that is one number, spread over the map, has no strides
    (grad,) = torch.autograd.grad(out.sum(), together)
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    one_by_one = torch.autograd.grad(halo_attention_triton(*leaves, *arguments[3:], shape).sum(), leaves)
    assert torch.equal(grad, torch.cat([x.flatten(1, 2) for x in one_by_one], 1))


@pytest.mark.parametrize("extra", [0, 2])
def test_operators_keep_what_they_declare(extra):
    shape = geometry(5, 6, 4, 1, stride=2)
    arguments = [None if x is None else x.float().requires_grad_() for x in make(shape, heads=2, extra=extra)]
    q, k, v, rel_h, rel_w, extra_k, extra_v = arguments
    table = torch.cat([rel_h, rel_w])[: 2 * (6 + 2 - 1)].detach().requires_grad_()
    options = (4, [1] * 4, 2, True, 0.5)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.halodet.halo_attention, (q, k, v, table, extra_k, extra_v, *options), test_utils=tests
    )
    kept = [None if x is None else x.detach() for x in (q, k, v, table, extra_k, extra_v)]
    out, lse = torch.ops.halodet.halo_attention(*kept, *options)
    torch.library.opcheck(
        torch.ops.halodet.halo_attention_backward,
        (torch.ones_like(out), out, lse, *kept, *options),
        test_utils=tests[:2],
    )


def test_compiled_equals_eager():
    arguments = [x.float().requires_grad_() for x in make(geometry(5, 6, 4, 1), heads=2)[:5]]
    options = {"block_size": 4, "halo_size": 1, "border": "mask", "backend": "triton"}

    def attend(*arguments):
        return halo_attention(*arguments, **options)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = []
    for function in (attend, compiled):
        out = function(*arguments)
        results.append([out, *torch.autograd.grad(out.sin().sum(), arguments)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_checkpointed_equals_plain():
    shape, arguments = some_case(5)
    for a, b in zip(
        run(lambda *x: checkpoint(halo_attention_triton, *x, use_reentrant=False), arguments, shape),
        run(halo_attention_triton, arguments, shape),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_autocast_changes_nothing():
    shape, arguments = some_case(5)
    expected = run(halo_attention_triton, arguments, shape)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for a, b in zip(run(halo_attention_triton, arguments, shape), expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_second_derivative_is_refused():
    shape = geometry(4, 4, 2, 1)
    arguments = [None if x is None else x.float().requires_grad_() for x in make(shape)]
    (first,) = torch.autograd.grad(
        halo_attention_triton(*arguments, shape).square().sum(), arguments[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


def test_what_the_kernels_cannot_do_is_refused_in_a_sentence():
    wide, narrow = geometry(4, 4, 2, 64), geometry(4, 4, 2, 1)
    for shape, options, dtype, message in (
        (narrow, {}, torch.float64, "no float64"),
        (narrow, {"depth": 129}, torch.float32, "128 channels per head, not 129"),
        (wide, {}, torch.float32, "256 rows of both position tables in use, and these windows have 262"),
    ):
        arguments = [None if x is None else x.to(dtype) for x in make(shape, **options)]
        assert message in unsupported_reason(arguments[0], arguments[2], shape)
        with pytest.raises(ValueError, match=message):
            halo_attention_triton(*arguments, shape)


def test_a_gpu_gets_triton_unless_something_is_wrong(monkeypatch):
    """What "auto" takes on a GPU: Triton, or one warning for the whole run; traced and exported models hold plain operators."""
    q = torch.empty(1, 1, 4, 4, 4, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    monkeypatch.setattr(halo, "_warned", False)
    shape = geometry(4, 4, 2, 1)
    monkeypatch.setattr(halo, "triton_unavailable_reason", lambda device: None)
    assert halo._choose(q, q, shape) == "triton"
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.jit, "is_tracing", lambda: True)
        assert halo._choose(q, q, shape) == "unfold"
    monkeypatch.setattr(halo, "triton_unavailable_reason", lambda device: "it rains")
    with pytest.warns(UserWarning, match="it rains"):
        assert halo._choose(q, q, shape) == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert halo._choose(q, q, shape) == "blocked"
