"""The Triton backend against the reference in float64; without a GPU in Triton's interpreter (see conftest.py)."""

import functools
import random
import re
import warnings

from halodet.attention import functional as halo
from halodet.attention import halo_attention, triton_ops
from halodet.attention.layout import BlockLayout
from halodet.attention.triton_ops import halo_attention_triton, triton_unavailable_reason, unsupported_reason

import pytest
import torch
from torch.utils.checkpoint import checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(triton_unavailable_reason(DEVICE) is not None, reason=str(triton_unavailable_reason(DEVICE))),
]


@pytest.fixture(autouse=True, scope="module")
def fast_interpreter():
    """Skip what takes the interpreter most time: patching the language at every call inside a kernel, where it is
    patched already, and checking every integer for overflow."""
    import triton.language as tl
    from triton.runtime import interpreter

    if DEVICE.type == "cuda" or not hasattr(interpreter, "_LangPatchScope"):  # a GPU, or an older Triton
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch_lang = interpreter._patch_lang

        def patch_once(fn):
            modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
            patched = not any(tl.core.is_builtin(module.add) for module in modules)
            return interpreter._LangPatchScope() if patched else patch_lang(fn)

        patch.setattr(interpreter, "_patch_lang", patch_once)
        options = interpreter.interpreter_builder.options
        before = options.sanitize_overflow
        object.__setattr__(options, "sanitize_overflow", False)
        yield
        object.__setattr__(options, "sanitize_overflow", before)


def make(layout, batch=1, heads=1, depth=4, value_depth=4, extra=0, seed=0):
    """Return the tensor arguments of a backend: float64 with values that float32 represents exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(DEVICE, torch.float64)

    arguments = [
        normal(batch, heads, depth, layout.query_height, layout.query_width),
        normal(batch, heads, depth, layout.height, layout.width),
        normal(batch, heads, value_depth, layout.height, layout.width),
        normal(2 * layout.window_height - 1, depth),
        normal(2 * layout.window_width - 1, depth),
    ]
    blocks = (batch, heads, layout.rows, layout.columns, extra)
    return arguments + ([normal(*blocks, depth), normal(*blocks, value_depth)] if extra else [None, None])


def make_layout(height, width, block, halo, stride=1, mask=True, scale=0.5):
    return BlockLayout(
        height, width, block, *((halo,) * 4 if isinstance(halo, int) else halo), stride=stride, mask=mask, scale=scale
    )


def run(backend, arguments, layout, dtype=torch.float32):
    """Return the output and all gradients."""
    arguments = [None if x is None else x.detach().to(dtype).requires_grad_() for x in arguments]
    out = backend(*arguments, layout)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view(out.shape).cos()
    return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), [x for x in arguments if x is not None])]


def assert_near(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        # Where all summands cancel, as in a table with one used row, rounding errors remain.
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max().clamp(min=0.1)


def some_case(seed):
    choose = random.Random(seed)
    stride = choose.choice((1, 1, 2))
    block = stride * choose.randint(1, 6 // stride)
    layout = make_layout(
        choose.randint(1, 11),
        choose.randint(1, 11),
        block,
        [choose.randint(0, 3) for _ in range(4)],
        stride,
        choose.random() < 0.5,
    )
    options = {"batch": choose.randint(1, 2), "heads": choose.randint(1, 2), "depth": choose.randint(1, 20)}
    return layout, make(
        layout, **options, value_depth=choose.randint(1, 20), extra=choose.choice((0, 0, 1, 3)), seed=seed
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_cases_equal_reference(seed):
    layout, arguments = some_case(seed)
    assert_near(
        run(halo_attention_triton, arguments, layout),
        run(halo.halo_attention_reference, arguments, layout, torch.float64),
    )


LARGE = {
    "more queries than a tile": (make_layout(13, 12, 12, 2), {"depth": 16}),
    "ragged blocks": (make_layout(10, 21, 8, 3, mask=False), {"depth": 16, "value_depth": 32}),
    "halo larger than the block": (make_layout(9, 5, 2, (5, 3, 4, 6)), {}),
    "halo on one side": (make_layout(9, 11, 4, (0, 0, 7, 0), mask=False), {}),
    "more extra keys than a tile": (make_layout(6, 3, 4, 1), {"extra": 18, "batch": 2, "heads": 2}),
    "blocks larger than the map": (make_layout(3, 5, 32, 1, stride=2), {}),
    "wide windows": (make_layout(3, 6, 4, 20, mask=False), {}),
}


@pytest.mark.parametrize("case", LARGE)
def test_cases_beyond_one_tile_equal_plain_pytorch(case):
    layout, options = LARGE[case]
    arguments = make(layout, **options)
    assert_near(
        run(halo_attention_triton, arguments, layout),
        run(halo.halo_attention_blocked, arguments, layout, torch.float64),
    )


@pytest.fixture
def half_types(monkeypatch):
    """Patch the interpreter, which stores bfloat16 as integers of its bits, to convert them in products and casts."""
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
    monkeypatch.setattr(triton_ops._kernels(), "SPLIT", tl.constexpr(True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [False, True])
def test_half_types_are_as_exact_as_plain_pytorch(mask, dtype, half_types):
    layout = make_layout(11, 9, 4, 2, mask=mask)
    arguments = [None if x is None else x.to(dtype) for x in make(layout, heads=2, depth=16, value_depth=8, extra=2)]
    exact = run(halo.halo_attention_blocked, arguments, layout, torch.float64)
    results = (
        run(halo_attention_triton, arguments, layout, dtype),
        run(halo.halo_attention_blocked, arguments, layout, dtype),
    )
    for e, triton, blocked in zip(exact, *results, strict=True):
        assert triton.dtype == dtype
        assert (triton.double() - e).norm() <= 2 * (blocked.double() - e).norm()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_logits_stay_finite(mask, sign):
    # All keys of a corner block's first tile are masked; with very negative logits any leak would dominate.
    layout = make_layout(5, 3, 4, (3, 3, 70, 3), mask=mask)
    arguments = make(layout, extra=1)
    q, k, _, rel_h, rel_w, extra_k, _ = arguments
    for x, mean in ((q, 100 * sign), (k, 2), (rel_h, 0.5), (rel_w, 0.5), (extra_k, 2)):
        x += mean
    exact = run(halo.halo_attention_blocked, arguments, layout, torch.float64)
    assert_near(run(halo_attention_triton, arguments, layout), exact, 1e-3)


@functools.cache
def plain():
    """Return a layout, arguments, and the output and gradients for them."""
    layout, arguments = some_case(4)
    return layout, arguments, run(halo_attention_triton, arguments, layout)


def test_results_are_deterministic():
    layout, arguments, expected = plain()
    for first, second in zip(run(halo_attention_triton, arguments, layout), expected, strict=True):
        assert torch.equal(first, second)


def test_maps_in_any_memory_format():
    layout = make_layout(3, 6, 4, 2)
    arguments = [None if x is None else x.float() for x in make(layout, batch=2, heads=2)]
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    expected = halo_attention_triton(*leaves, *arguments[3:], layout)
    # Views of one channels-last tensor, as a fused projection returns them.
    together = torch.cat([x.flatten(1, 2) for x in arguments[:3]], 1).contiguous(memory_format=torch.channels_last)
    maps = [x.unflatten(1, (2, 4)) for x in together.requires_grad_().chunk(3, 1)]
    assert maps[0].stride(2) == 1 and not maps[0].is_contiguous()
    out = halo_attention_triton(*maps, *arguments[3:], layout)
    assert torch.equal(out, expected)
    assert out.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)
    # An expanded scalar gradient has zero strides.
    (grad,) = torch.autograd.grad(out.sum(), together)
    one_by_one = torch.autograd.grad(expected.sum(), leaves)
    assert torch.equal(grad, torch.cat([x.flatten(1, 2) for x in one_by_one], 1))


@pytest.mark.parametrize("extra", [0, 2])
def test_operators_pass_opcheck(extra):
    layout = make_layout(5, 6, 4, 1, stride=2)
    arguments = [None if x is None else x.float().requires_grad_() for x in make(layout, heads=2, extra=extra)]
    q, k, v, rel_h, rel_w, extra_k, extra_v = arguments
    table = torch.cat([rel_h, rel_w])[: 2 * (6 + 2 - 1)].detach().requires_grad_()
    options = (4, [1] * 4, 2, True, 0.5, False)
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
    arguments = [x.float().requires_grad_() for x in make(make_layout(5, 6, 4, 1), heads=2)[:5]]
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
    layout, arguments, expected = plain()
    recomputed = run(lambda *x: checkpoint(halo_attention_triton, *x, use_reentrant=False), arguments, layout)
    for a, b in zip(recomputed, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing():
    layout, arguments, expected = plain()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for a, b in zip(run(halo_attention_triton, arguments, layout), expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_double_backward_raises():
    layout = make_layout(4, 4, 2, 1)
    arguments = [None if x is None else x.float().requires_grad_() for x in make(layout)]
    (first,) = torch.autograd.grad(
        halo_attention_triton(*arguments, layout).square().sum(), arguments[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_unsupported_tensors_raise():
    wide, narrow = make_layout(4, 4, 2, 64), make_layout(4, 4, 2, 1)
    for layout, options, dtype, message in (
        (narrow, {}, torch.float64, "float64"),
        (narrow, {"depth": 129}, torch.float32, "128 .*129"),
        (wide, {}, torch.float32, "256 .*262"),
        (narrow, {"value_depth": 33}, torch.float32, "32 .*TF32, got 33"),
    ):
        arguments = [None if x is None else x.to(dtype) for x in make(layout, **options)]
        assert re.search(message, unsupported_reason(arguments[0], arguments[2], layout))
        with pytest.raises(ValueError, match=message):
            halo_attention_triton(*arguments, layout)


@pytest.fixture
def forget():
    """Forget the calls that have failed."""
    triton_ops._failed.clear()
    yield
    triton_ops._failed.clear()


def broken(error):
    def run(*args, **kwargs):
        raise error

    return run


@pytest.mark.parametrize(
    ("broken_kernel", "extra"),
    [(name, extra) for name in ("forward", "backward_queries", "backward_keys") for extra in (0, 2)]
    + [("backward_extra", 2)],
)
def test_plain_pytorch_takes_over_from_kernels_that_cannot_run(broken_kernel, extra, forget, monkeypatch):
    layout = make_layout(5, 7, 4, (1, 2, 3, 0), stride=2, mask=extra > 0)
    arguments = make(layout, batch=2, heads=2, extra=extra)
    exact = run(halo.halo_attention_blocked, arguments, layout, torch.float64)
    from triton.runtime.errors import OutOfResources

    kernel = getattr(triton_ops._kernels(), broken_kernel)
    monkeypatch.setattr(type(kernel), "run", guarded(kernel, broken(OutOfResources(200, 100, "shared memory"))))
    with pytest.raises(RuntimeError, match="shared memory.*backend='auto'"):
        run(halo_attention_triton, arguments, layout)
    attend = functools.partial(halo_attention_triton, fallback=True)
    with pytest.warns(UserWarning, match="shared memory") as caught:
        results = [run(attend, arguments, layout) for _ in range(3)]
    assert len(caught) == 1
    for result in results:
        assert_near(result, exact)
    if broken_kernel == "forward":  # which the kernels of the backward must not take for a result
        half = [None if x is None else x.float() for x in arguments]
        rows = sum(triton_ops._rows(window, layout) for window in (layout.window_height, layout.window_width))
        table = torch.cat([half[3], half[4]])[:rows]
        options = (layout.block, [layout.top, layout.bottom, layout.left, layout.right], 2, layout.mask, 0.5, True)
        assert triton_ops._forward(*half[:3], table, *half[5:], *options)[1].isnan().all()
    compiled = torch.compile(functools.partial(attend, layout=layout), backend="aot_eager", fullgraph=True)
    assert_near(run(lambda *x: compiled(*x[:-1]), arguments, layout), exact)


def guarded(kernel, replacement):
    """Return ``run`` of a kernel's class in which this one kernel has the replacement."""
    original = type(kernel).run
    return lambda self, *args, **kwargs: (replacement if self is kernel else partial_run(original, self))(
        *args, **kwargs
    )


def partial_run(run, kernel):
    return functools.partial(run, kernel)


def test_memory_errors_and_failed_gpus_are_not_hidden(forget, monkeypatch):
    layout, arguments, _ = plain()
    arguments = [None if x is None else x.float() for x in arguments]
    for error, expected in (
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        monkeypatch.setattr(triton_ops, "_launch_forward", broken(error))
        with pytest.raises(expected):
            halo_attention_triton(*arguments, layout, fallback=True)
    assert not triton_ops._failed
    kind = (torch.device("cuda", 0), "a kind of call")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", broken(RuntimeError("CUDA error: device-side assert")))
    with pytest.raises(RuntimeError, match="cuda:0 has failed .*device-side assert.*illegal"):
        with triton_ops._plain_if_impossible(kind, True):
            raise RuntimeError("illegal address")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph.*once"):
        with triton_ops._plain_if_impossible(kind, True):
            pass


@pytest.mark.parametrize("fault", ["ROCm", "no compiler"])
def test_gpus_without_usable_kernels_are_named(fault, monkeypatch):
    triton_ops._unavailable_reason.cache_clear()
    device = torch.device("cuda", 0)
    if fault == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(triton_ops._kernels(), "INTERPRETED", False)
    else:
        monkeypatch.setattr(triton_ops, "_kernels", broken(RuntimeError("Failed to find C compiler")))
    try:
        assert ("ROCm" if fault == "ROCm" else "C compiler") in triton_unavailable_reason(device)
    finally:
        triton_ops._unavailable_reason.cache_clear()


def test_tilings_are_chosen_by_what_the_gpu_has():
    kernels = triton_ops._kernels()
    configs = [kernels._config(4, BLOCK_M=size, BLOCK_N=32) for size in (16, 32, 64, 128)]
    needs = {16: (90_000, 0), 32: (120_000, 0), 64: (60_000, 1024), 128: None}

    def measure(config):
        need = needs[config.kwargs["BLOCK_M"]]
        if need is None:
            raise ValueError("cannot compile")
        return need

    def chosen(limit):
        return [config.kwargs["BLOCK_M"] for config in kernels.select_tilings(configs, measure, limit)]

    assert chosen(200_000) == [16, 32] and chosen(100_000) == [16]
    assert chosen(80_000) == [64], "one that spills is better than none"
    needs[64] = 60_000, 4096
    with pytest.raises(RuntimeError, match="90000 bytes .*80000"):
        chosen(80_000)
    needs[16] = needs[32] = needs[64]
    with pytest.raises(RuntimeError, match="spills 4096 bytes"):
        chosen(80_000)
    needs[16] = 90_000, 0
    with pytest.raises(RuntimeError, match="90000 bytes .*50000"):
        chosen(50_000)
    assert [c.kwargs["BLOCK_M"] for c in kernels.sized_tilings(configs, 8)] == [16, 32, 64]
    assert [c.kwargs["BLOCK_M"] for c in kernels.sized_tilings(configs, 2)] == [16]


def test_tilings_are_fixed_under_deterministic_algorithms(monkeypatch):
    monkeypatch.setattr(triton_ops, "TUNED_TILES", 2)
    q, layout = torch.empty(1, 1, 4, 16, 16), make_layout(16, 16, 8, 3)
    assert triton_ops._is_tuned(q, layout) and not triton_ops._is_tuned(q, make_layout(4, 4, 4, 1))
    torch.use_deterministic_algorithms(True)
    try:
        assert not triton_ops._is_tuned(q, layout)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_largest_half_numbers_stay_finite(half_types):
    layout = make_layout(5, 3, 4, 1, mask=True)
    arguments = [None if x is None else x.clamp(-1, 1) * 30_000 for x in make(layout, depth=16)]
    arguments[2] = arguments[2] / 30_000  # values: their gradients are those of the queries and keys
    for dtype in (torch.float16, torch.bfloat16):
        half = [None if x is None else x.to(dtype) for x in arguments]
        assert halo_attention_triton(*half, layout).isfinite().all()


def test_auto_backend_on_a_gpu(monkeypatch):
    """Triton, or one warning per process if it is unavailable; traced models contain plain operators."""
    q = torch.empty(1, 1, 4, 4, 4, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    monkeypatch.setattr(halo, "_warned", False)
    layout = make_layout(4, 4, 2, 1)
    monkeypatch.setattr(halo, "triton_unavailable_reason", lambda device: None)
    assert halo._select_backend(q, q, layout) == "triton"
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.jit, "is_tracing", lambda: True)
        assert halo._select_backend(q, q, layout) == "unfold"
    monkeypatch.setattr(halo, "triton_unavailable_reason", lambda device: "no driver")
    with pytest.warns(UserWarning, match="no driver"):
        assert halo._select_backend(q, q, layout) == "blocked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert halo._select_backend(q, q, layout) == "blocked"
