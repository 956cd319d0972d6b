"""Every mixer against its definition at random settings; HALODET_OPERATOR_SETTINGS sets how many (3)."""

import functools
import os
import random

from halodet.attention import halo_attention
from halodet.mixers import MIXERS, BoTNetMixer, ExternalMixer, HaloMixer

import pytest
import torch
from mixers import (
    test_blockwise,
    test_botnet,
    test_csa,
    test_elsa,
    test_external,
    test_focal,
    test_key_only,
    test_lambda_layer,
    test_lesa,
    test_neighborhood,
    test_plg,
    test_slide,
)

COUNT = int(os.environ.get("HALODET_OPERATOR_SETTINGS", "3"))
LIMIT = 1e-12  # of the greatest difference, relative to the greatest value


def make_botnet(seed, **options):
    torch.manual_seed(seed)
    return BoTNetMixer(6, 8, num_heads=2, qk_channels=4, **options).double()


def botnet_reference(mixer, x):
    return test_botnet.reference(mixer, x, x.shape[-2:])


def make_halo(seed, **options):
    torch.manual_seed(seed)
    return HaloMixer(6, 8, num_heads=2, **options).double()


def halo_reference(mixer, x):
    """Attention by explicit loops, on the mixer's projections."""
    weights = mixer.kv.weight.view(2, 7, 6, 1, 1)
    q, k, v = (
        torch.nn.functional.conv2d(x, weight.reshape(-1, 6, 1, 1)).view(1, 2, -1, *x.shape[-2:])
        for weight in (mixer.q.weight.view(2, 3, 6, 1, 1), weights[:, :3], weights[:, 3:])
    )
    tables = mixer.pos_embed.height_rel, mixer.pos_embed.width_rel
    return halo_attention(
        q, k, v, *tables, block_size=mixer.block_size, halo_size=mixer.halo_size, border=mixer.border,
        backend="reference",
    ).flatten(1, 2)  # fmt: skip


def make_external(seed, **options):
    torch.manual_seed(seed)
    mixer = ExternalMixer(6, **options).double().eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


def external_reference(mixer, x):
    attention, x = mixer.attention, mixer.conv(x)
    return x + attention.norm(attention.proj_out(test_external.reference(attention, attention.proj_in(x))))


def odd(rng, *sizes):
    return {"kernel_size": rng.choice(sizes or (1, 3, 5, 7)), "num_heads": rng.choice((1, 2))}


# By mixer: how to build one, its definition, random options, and the largest side of a map.
CASES = {
    "blockwise": (
        test_blockwise.make,
        test_blockwise.reference,
        lambda rng: {
            "num_heads": rng.choice((1, 2)),
            "block_size": rng.randint(1, 6),
            "halo_size": rng.randint(0, 4),
            "mirrored": rng.random() < 0.5,
        },
        12,
    ),
    "botnet": (
        make_botnet,
        botnet_reference,
        lambda rng: {
            "table_size": (rng.randint(1, 6), rng.randint(1, 6)),
            "position": rng.choice(("interpolate", "offset")),
        },
        5,
    ),
    "csa": (test_csa.make, test_csa.reference, lambda rng: {"num_heads": rng.choice((1, 2, 4))}, 8),
    "elsa": (
        test_elsa.make,
        test_elsa.reference,
        lambda rng: {
            **odd(rng, 1, 3, 5),
            "dilation": rng.randint(1, 3),
            "group_width": rng.choice((1, 2, 4)),
            "multiply": rng.random() < 0.5,
            "add": rng.random() < 0.5,
        },
        5,
    ),
    "external": (make_external, external_reference, lambda rng: {"slots": rng.randint(1, 9)}, 9),
    "focal": (
        test_focal.make,
        test_focal.reference,
        lambda rng: {
            "num_heads": rng.choice((1, 2)),
            "block_size": rng.randint(1, 4),
            "halo_size": rng.randint(0, 3),
            "focal_window": rng.choice((0, 1, 3, 5)),
        },
        9,
    ),
    "halo": (
        make_halo,
        halo_reference,
        lambda rng: {
            "block_size": rng.randint(1, 7),
            "halo_size": rng.randint(0, 4),
            "border": rng.choice(("mask", "zero")),
        },
        12,
    ),
    "key_only": (
        test_key_only.make,
        test_key_only.reference,
        lambda rng: {
            **odd(rng),
            "scope": rng.choice(("both", "local", "global")),
            "gate": rng.choice(("none", "value", "sigmoid")),
        },
        6,
    ),
    "lambda": (
        test_lambda_layer.make,
        test_lambda_layer.reference,
        lambda rng: {**odd(rng), "key_channels": rng.randint(1, 5)},
        7,
    ),
    "lesa": (
        lambda seed, **options: test_lesa.make(seed, **options).eval(),
        test_lesa.reference,
        lambda rng: {
            "num_heads": rng.choice((1, 2)),
            "binary": rng.choice(("halo", "global")),
            "block_size": rng.randint(1, 5),
            "halo_size": rng.randint(0, 3),
            "table_size": rng.choice((None, 1, 4)),
        },
        7,
    ),
    "neighborhood": (
        test_neighborhood.make,
        test_neighborhood.reference,
        lambda rng: {**odd(rng), "dilation": rng.randint(1, 4)},
        9,
    ),
    "plg": (
        test_plg.make,
        test_plg.reference,
        lambda rng: {
            "num_heads": rng.choice((2, 4)),
            "block_size": rng.randint(1, 5),
            "halo_size": rng.randint(0, 3),
            "grid_size": rng.randint(1, 7),
            "border": rng.choice(("mask", "zero")),
        },
        10,
    ),
    "slide": (
        test_slide.make,
        test_slide.reference,
        lambda rng: {**odd(rng, 1, 3, 5), "bias_on": rng.choice(("logits", "keys"))},
        6,
    ),
}


def test_every_mixer_has_a_definition():
    assert set(CASES) | {"conv"} == set(MIXERS)


@functools.cache
def largest_difference(name):
    """Return the largest relative difference over the settings, and the setting it occurs at."""
    make, reference, options, side = CASES[name]
    worst = (0.0, None)
    for seed in range(COUNT):
        rng = random.Random(seed)
        setting, size = options(rng), (rng.randint(1, side), rng.randint(1, side))
        mixer = make(seed, **setting)
        x = torch.randn(1, 8 if name in ("lesa", "plg") else 6, *size, dtype=torch.float64)
        with torch.no_grad():
            actual, expected = mixer(x), reference(mixer, x)
        assert actual.shape == expected.shape and expected.abs().max() > 0
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, (difference, (seed, setting, size)), key=lambda item: item[0])
    return worst


@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_the_definition_at_random_settings(name):
    difference, setting = largest_difference(name)
    print(f"{name}: greatest relative difference {difference:.1e} over {COUNT} settings, at {setting}")
    assert difference <= LIMIT, setting
