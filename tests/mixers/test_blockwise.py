"""BlockwiseMixer against windows that are visited one after the other, each of which overwrites the overlap."""

from halodet.mixers import BlockwiseMixer
from halodet.models import HaloNet, get_variant

import pytest
import torch


def make(seed=0, **options):
    torch.manual_seed(seed)
    mixer = BlockwiseMixer(6, 8, **{"num_heads": 2, "block_size": 4, "halo_size": 2, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def reference(mixer, x):
    """Visit windows in raster order, in steps of a block, and overwrite the overlap; backwards for a mirrored one."""
    height, width = x.shape[-2:]
    block, halo = mixer.block_size, max(mixer.halo_size)
    q, k, v = mixer.qkv(x)[0].split((6, 6, 8))
    out = torch.full((8, height, width), float("nan"), dtype=x.dtype)
    corners = [(top, left) for top in range(0, height, block) for left in range(0, width, block)]
    for top, left in reversed(corners) if mixer.mirrored else corners:
        if mixer.mirrored:
            area = slice(max(0, top - halo), top + block), slice(max(0, left - halo), left + block)
        else:
            area = slice(top, top + block + halo), slice(left, left + block + halo)
        for h in range(mixer.num_heads):
            qh, kh, vh = (
                t.view(mixer.num_heads, -1, height, width)[h][(slice(None), *area)].flatten(1) for t in (q, k, v)
            )
            attended = vh @ (qh.t() @ kh).softmax(1).t()
            place = out.view(mixer.num_heads, -1, height, width)[h][(slice(None), *area)]
            place.copy_(attended.view(place.shape))
    return out[None]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(9, 11), (4, 4), (1, 3), (8, 13)])
def test_equals_windows_that_overwrite_their_overlap(size, mirrored):
    mixer = make(mirrored=mirrored)
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


def test_a_mirrored_one_sees_the_other_side():
    mixer, mirrored = make(), make(mirrored=True)
    mirrored.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 6, 8, 12, dtype=torch.float64)  # a multiple of the block: mirrored blocks are the same ones
    torch.testing.assert_close(mirrored(x.flip(2, 3)).flip(2, 3), mixer(x))
    changed = x.clone()
    changed[..., 7, 7] += 1  # in the lower right block
    assert (mixer(x) != mixer(changed)).any(1)[0, :4, :4].sum() == 0
    changed = x.clone()
    changed[..., 4, 4] += 1
    assert (mixer(x) != mixer(changed)).any(1)[0, :4, :4].all()
    assert (mirrored(x) != mirrored(changed)).any(1)[0, :4, :4].sum() == 0


def test_gradients_are_those_of_finite_differences():
    mixer = make()
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("options", [{"block_size": 0}, {"num_heads": 4}, {"halo_size": -1}, {"backend": "fast"}])
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        BlockwiseMixer(6, 8, **{"num_heads": 2, **options})


def test_directions_alternate_between_the_blocks_of_a_stage():
    variant = get_variant("R50-blockwise", depths=(1, 1, 3, 2), base_width=8, num_heads=(1,) * 4)
    with torch.device("meta"):
        model = HaloNet(variant, mixer_options={"blockwise": {"mirrored": "alternate"}})
    assert [[block.mixer.mirrored for block in stage] for stage in (model.res4, model.res5)] == [
        [False, True, False],
        [False, True],
    ]
    with pytest.raises(ValueError, match="mirrored='both'"):
        HaloNet(variant, mixer_options={"blockwise": {"mirrored": "both"}})
