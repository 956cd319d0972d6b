"""All compared layers compute the same function."""

import dataclasses
import functools
import weakref

from halodet.benchmark import attention
from halodet.benchmark.attention import Case, build_call, build_layer, is_installed, make_cases
from halodet.benchmark.measure import compare
from halodet.benchmark.peak_memory import peak_of_second_call

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CASE = Case(batch=2, channels=128, height=12, width=19, block=4, halo=2)
CPU = torch.device("cpu")


def same_weights(name, border):
    """Build halodet's layer and another with the same weights."""
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    ours, other = build_layer("halodet", CASE, border), build_layer(name, CASE, border)
    state = ours.state_dict()
    if name == "halonet-pytorch":
        # It scales q before adding positions, and stores all keys before all values.
        depth = CASE.channels // CASE.heads
        keys, values = state["kv.weight"].flatten(1).unflatten(0, (CASE.heads, 2, depth)).unbind(1)
        state = {
            "to_q.weight": state["q.weight"].flatten(1),
            "to_kv.weight": torch.cat((keys.flatten(0, 1), values.flatten(0, 1))),
            "rel_pos_emb.rel_height": state["pos_embed.height_rel"] * depth**0.5,
            "rel_pos_emb.rel_width": state["pos_embed.width_rel"] * depth**0.5,
        }
    (other.layer if hasattr(other, "layer") else other).load_state_dict(state)
    return ours, other


@pytest.mark.parametrize("name", ["timm", "flex-attention"])
def test_implementations_with_zero_border_are_equal(name):
    if name == "flex-attention":
        pytest.importorskip("torch.nn.attention.flex_attention")
    ours, other = same_weights(name, "zero")
    x = torch.randn(2, 128, 12, 19)
    with torch.no_grad():
        torch.testing.assert_close(other(x), ours(x), rtol=1e-4, atol=1e-5)


def test_halonet_pytorch_with_mask_is_equal():
    ours, other = same_weights("halonet-pytorch", "mask")
    x = torch.randn(2, 128, 12, 20)  # divisible by the block size: its own padding is not masked
    with torch.no_grad():
        torch.testing.assert_close(other(x), ours(x), rtol=1e-4, atol=1e-5)


def test_training_call_is_repeatable():
    call = build_call("halodet", CASE, "forward+backward", "mask", "auto", CPU, torch.float32)
    layer, x, _ = call.args
    leaves, grads = [x, *layer.parameters()], []
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(lambda leaf: grads.append(leaf.grad.clone()))
    first, second = call(), call()
    assert first.shape == (2, 128, 12, 19) and torch.equal(first, second)
    assert len(grads) == 2 * len(leaves)
    by_size = [
        sorted((g.numel(), g.sum().item()) for g in part) for part in (grads[: len(leaves)], grads[len(leaves) :])
    ]
    assert by_size[0] == by_size[1]  # gradients do not accumulate over calls
    assert all(leaf.grad is None for leaf in leaves)


class LiveStorages(TorchDispatchMode):
    """An allocator's statistics, from the storages that operators return."""

    def __init__(self, tensors):
        super().__init__()
        self.live, self.now, self.maximum = {}, 0, 0
        self.add(tensors)

    def allocated(self):
        return self.now

    def reset_peak(self):
        self.maximum = self.now

    def peak(self):
        return self.maximum

    def free(self, key):
        self.now -= self.live.pop(key)

    def add(self, tensors):
        for storage in (x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.maximum = max(self.maximum, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def test_peak_memory_of_training_counts_gradients():
    """The peak is that of a step in a process in which no step has run."""
    peaks = []
    for measure in (peak_of_first_call, peak_of_second_call):
        call = build_call("halodet", CASE, "forward+backward", "mask", "blocked", CPU, torch.float32)
        layer, x, grad = call.args
        with LiveStorages([x, grad, *layer.parameters(), *layer.buffers()]) as allocator:
            peaks.append(measure(call, allocator))
    grads = 4 * sum(leaf.numel() for leaf in (x, *layer.parameters()))
    assert peaks[0] > grads and peaks[1] == peaks[0]


def peak_of_first_call(call, allocator):
    before = allocator.allocated()
    call()
    return allocator.peak() - before


FLEX = Case(batch=1, channels=128, height=4, width=4, block=4, halo=1)


@pytest.fixture
def quick_compile(monkeypatch):
    """Compile without generating code."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    attention._reset_compiler()
    yield
    attention._reset_compiler()


def flex_call(case):
    return build_call("flex-attention", case, "forward", "zero", "auto", CPU, torch.float32)


def test_flex_attention_that_runs_uncompiled_is_an_error(quick_compile):
    flex_call(FLEX)()
    with torch.compiler.set_stance("force_eager"):
        results = compare({"flex-attention": lambda: flex_call(FLEX)}, reference="", rounds=1, device=CPU)
    assert "without torch.compile" in results["flex-attention"]["failed"]


def test_recompile_limit_applies_to_each_setting(quick_compile):
    other = dataclasses.replace(FLEX, width=9)
    with torch._dynamo.config.patch(recompile_limit=1):
        first, second = flex_call(FLEX), flex_call(other)
        second()
        with pytest.raises(RuntimeError, match="not compiled: .*fullgraph"):
            first()  # a second shape without a reset
        for case in (FLEX, other, FLEX):
            flex_call(case)()


def test_make_cases_combines_all_sizes_of_padded_images():
    found = make_cases([(800, 1333)], [8, 32], [1, 2], [(8, 3)])
    assert [(s.batch, s.channels, s.height, s.width) for s in found] == [
        (1, 128, 100, 168),
        (1, 512, 25, 42),
        (2, 128, 100, 168),
        (2, 512, 25, 42),
    ]
