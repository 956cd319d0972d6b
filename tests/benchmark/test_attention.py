"""All compared layers compute the same function."""

from halodet.benchmark.attention import Case, build_call, build_layer, is_installed, make_cases

import pytest
import torch

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
    first, second = call(), call()
    assert first.shape == (2, 128, 12, 19) and torch.equal(first, second)
    x = call.args[1]
    before = x.grad.clone()
    call()
    assert torch.equal(x.grad, before)  # gradients do not accumulate over calls


def test_make_cases_combines_all_sizes_of_padded_images():
    found = make_cases([(800, 1333)], [8, 32], [1, 2], [(8, 3)])
    assert [(s.batch, s.channels, s.height, s.width) for s in found] == [
        (1, 128, 100, 168),
        (1, 512, 25, 42),
        (2, 128, 100, 168),
        (2, 512, 25, 42),
    ]
