"""The layers that are compared compute the same thing, and what is counted is what there is."""

from halodet.benchmark.attention import Setting, available, build_call, build_layer, settings
from halodet.benchmark.measure import geometric_mean, interleave, peak_memory, ratio

import pytest
import torch

SETTING = Setting(batch=2, channels=128, height=12, width=19, block=4, halo=2)
CPU = torch.device("cpu")


def same_weights(name, border):
    """Our layer and another with its weights."""
    if not available(name):
        pytest.skip(f"{name} is not installed")
    torch.manual_seed(0)
    ours, other = build_layer("halodet", SETTING, border), build_layer(name, SETTING, border)
    state = ours.state_dict()
    if name == "halonet-pytorch":
        # It scales q before the positions see it, and keeps all keys before all values.
        depth = SETTING.channels // SETTING.heads
        keys, values = state["kv.weight"].flatten(1).unflatten(0, (SETTING.heads, 2, depth)).unbind(1)
        state = {
            "to_q.weight": state["q.weight"].flatten(1),
            "to_kv.weight": torch.cat((keys.flatten(0, 1), values.flatten(0, 1))),
            "rel_pos_emb.rel_height": state["pos_embed.height_rel"] * depth**0.5,
            "rel_pos_emb.rel_width": state["pos_embed.width_rel"] * depth**0.5,
        }
    (other.layer if hasattr(other, "layer") else other).load_state_dict(state)
    return ours, other


@pytest.mark.parametrize("name", ["timm", "flex-attention"])
def test_contenders_with_zeros_outside_compute_the_same(name):
    if name == "flex-attention":
        pytest.importorskip("torch.nn.attention.flex_attention")
    ours, other = same_weights(name, "zero")
    x = torch.randn(2, 128, 12, 19)
    with torch.no_grad():
        torch.testing.assert_close(other(x), ours(x), rtol=1e-4, atol=1e-5)


def test_halonet_pytorch_masks_and_computes_the_same():
    ours, other = same_weights("halonet-pytorch", "mask")
    x = torch.randn(2, 128, 12, 20)  # blocks divide it: what it pads itself would take part
    with torch.no_grad():
        torch.testing.assert_close(other(x), ours(x), rtol=1e-4, atol=1e-5)


def test_training_call_repeats_itself():
    call = build_call("halodet", SETTING, "training", "mask", "auto", CPU, torch.float32)
    first, second = call(), call()
    assert first.shape == (2, 128, 12, 19) and torch.equal(first, second)
    x = call.args[1]
    before = x.grad.clone()
    call()
    assert torch.equal(x.grad, before)  # gradients are not summed over calls


def test_settings_are_every_combination_on_padded_images():
    found = settings([(800, 1333)], [8, 32], [1, 2], [(8, 3)])
    assert [(s.batch, s.channels, s.height, s.width) for s in found] == [
        (1, 128, 100, 168),
        (1, 512, 25, 42),
        (2, 128, 100, 168),
        (2, 512, 25, 42),
    ]


def test_work_counts_what_a_layer_cannot_leave_out():
    # 1 image, 8 channels, one block of 2×2 with a halo of 1, 8 heads of depth 1: projections 3·8·8·4, pairs 4·16 for q·k and for p·v in
    # 8 channels, positions 4·(4 + 4)·8 multiply-adds.
    setting = Setting(1, 8, 2, 2, 2, 1)
    operations, moved = setting.work(4, train=False)
    assert operations == 2 * (3 * 64 * 4 + 2 * 4 * 16 * 8 + 4 * 8 * 8)
    assert moved == 8 * 4 * 4 * 8  # x, q, k, v, then q, k, v and the result
    assert setting.work(4, train=True) == (3 * operations, 3 * moved)


def test_calls_are_timed_in_turns():
    order = []
    seconds = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, device=CPU, warmup=1
    )
    assert "".join(order) == "ab" * 4
    assert [len(x) for x in seconds.values()] == [3, 3]


def test_ratio_and_mean():
    assert ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2.0
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def holds(mebibytes):
    return lambda: torch.ones(mebibytes << 18)


def test_peak_memory_sees_what_a_call_holds():
    peak = peak_memory(holds, 64, device=CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 60 << 20 < peak < 90 << 20
