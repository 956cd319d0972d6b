"""The contract of all registered mixers; HaloMixer against timm with timm's weights."""

from halodet.mixers import MIXERS, Mixer, MixerSpec, build_mixer, register_mixer
from halodet.mixers.halo import HaloMixer

import pytest
import torch


def spec(**changes):
    values = {
        "channels": 16,
        "value_channels": 24,
        "stride": 1,
        "num_heads": 4,
        "block_size": 4,
        "halo_size": 2,
        "border": "mask",
    }
    return MixerSpec(**{**values, **changes})


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [4, 7])
def test_any_size_gives_the_documented_size(name, stride, block):
    mixer = build_mixer(name, spec(stride=stride, block_size=block))
    for height, width in [(8, 8), (1, 1), (3, 2), (13, 21), (14, 5)]:
        x = torch.randn(2, 16, height, width, requires_grad=True)
        out = mixer(x)
        assert out.shape == (2, mixer.out_channels, -(-height // stride), -(-width // stride))
        out.square().sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_mixers_mix_neighbors(name):
    mixer = build_mixer(name, spec())
    x = torch.randn(1, 16, 8, 8)
    changed = x.clone()
    changed[..., 2, 2] += 1
    assert (mixer(x) - mixer(changed))[..., 2, 3].abs().sum() > 0


def test_unknown_mixer_lists_the_mixers():
    with pytest.raises(ValueError, match="'lambad'.*conv.*halo"):
        build_mixer("lambad", spec())


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="num_heads=3"):
        HaloMixer(16, 24, num_heads=3)


@pytest.mark.parametrize(
    ("stride", "block", "halo", "depth"),
    [(1, 8, 3, 8), (2, 8, 3, 8), (1, 7, 2, 8), (2, 7, 2, 8), (1, 8, 2, 8), (1, 8, 3, 4), (2, 8, 3, 16)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_halo_mixer_equals_timm_with_its_weights(stride, block, halo, depth, memory_format):
    halo_attn = pytest.importorskip("timm.layers.halo_attn", reason="timm is not installed")
    theirs = halo_attn.HaloAttn(
        32, 48, stride=stride, num_heads=4, dim_head=depth, block_size=block, halo_size=halo
    ).double()
    ours = HaloMixer(
        32, 48, stride=stride, num_heads=4, qk_channels=4 * depth, block_size=block, halo_size=halo, border="zero"
    ).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 32, 2 * block, 4 * block, dtype=torch.float64).contiguous(memory_format=memory_format)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours(x))
    for a, b in zip(
        *(torch.autograd.grad((m(x) * weight).sum(), list(m.parameters())) for m in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_initialization_is_timms():
    mixer = HaloMixer(256, 256, num_heads=8, block_size=8, halo_size=3)
    for weight, std in (
        (mixer.q.weight, 256**-0.5),
        (mixer.kv.weight, 256**-0.5),
        (mixer.pos_embed.height_rel, 32**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert weight.mean().abs().item() < std / 10


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_autocast_computes_in_bfloat16(name):
    torch.manual_seed(0)
    mixer = build_mixer(name, spec())
    x = torch.randn(2, 16, 13, 9)
    exact = mixer(x)
    weight = torch.randn_like(exact)  # not squares: their sum is constant after a batch norm, its gradient rounding
    (gradient,) = torch.autograd.grad((exact * weight).sum(), next(mixer.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mixer(x)
    (half_gradient,) = torch.autograd.grad((half.float() * weight).sum(), next(mixer.parameters()))
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.05 * exact.norm()
    assert half_gradient.dtype == torch.float32 and (half_gradient - gradient).norm() < 0.05 * gradient.norm()


def test_unknown_options_name_the_known_ones():
    with pytest.raises(ValueError, match="kernel=3.*position, table_size, window"):
        build_mixer("botnet", spec(options={"kernel": 3}))
    with pytest.raises(ValueError, match="kernel=3.*no options"):
        build_mixer("conv", spec(options={"kernel": 3}))


def test_only_mixers_can_be_registered():
    with pytest.raises(TypeError, match="'linear'"):
        register_mixer("linear")(torch.nn.Linear)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_declared_tables_exist_and_keep_their_layout(name):
    mixer = build_mixer(name, spec())
    parameters = dict(mixer.named_parameters())
    inner = {prefix: module for prefix, module in mixer.named_modules() if isinstance(module, Mixer)}
    declared = {f"{prefix}.{n}".lstrip(".") for prefix, module in inner.items() for n in module.no_weight_decay()}
    assert {n for n in parameters if n.endswith("_rel")} <= declared <= set(parameters)
    layout = mixer.rel_pos_layout()
    for table in mixer.rel_pos_tables:
        rows = parameters[table].shape[0]
        assert mixer.infer_rel_pos_layout(rows, {}) == layout
        assert torch.equal(mixer.resize_rel_pos(parameters[table], layout), parameters[table])
