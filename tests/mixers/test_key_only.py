"""KeyOnlyMixer against its definition, and the identities of weights that no query changes."""

from halodet.mixers import KeyOnlyMixer

import pytest
import torch
import torch.nn.functional as F


def make(seed=0, **options):
    torch.manual_seed(seed)
    mixer = KeyOnlyMixer(6, 8, **{"num_heads": 2, "kernel_size": 3, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


def reference(mixer, x):
    """Compute the output of a (1, C, H, W) map pixel by pixel."""
    height, width = x.shape[-2:]
    heads, reach = mixer.num_heads, mixer.kernel_size // 2
    projected = torch.einsum("oc,chw->ohw", mixer.kv.weight[:, :, 0, 0], x[0])
    keys, values = projected.split((6, 8))
    keys, values = keys.view(heads, -1, height, width), values.view(heads, -1, height, width)
    scale = mixer.saliency.shape[1] ** -0.5
    logits = torch.stack([(mixer.saliency[h, :, None, None] * keys[h]).sum(0) * scale for h in range(heads)])
    out = torch.zeros_like(values)
    for h in range(heads):
        for y in range(height):
            for z in range(width):
                parts = {}
                for name, rows, columns in (
                    ("local", range(y - reach, y + reach + 1), range(z - reach, z + reach + 1)),
                    ("global", range(height), range(width)),
                ):
                    inside = [(i, j) for i in rows for j in columns if 0 <= i < height and 0 <= j < width]
                    weights = torch.stack([logits[h, i, j] for i, j in inside]).softmax(0)
                    parts[name] = sum(w * values[h, :, i, j] for w, (i, j) in zip(weights, inside, strict=True))
                share = {"local": 1.0, "global": 0.0}.get(mixer.scope)
                share = torch.sigmoid(mixer.share[h]) if share is None else share
                out[h, :, y, z] = share * parts["local"] + (1 - share) * parts["global"]
    if mixer.gate == "value":
        out = out * values
    out = out.reshape(1, -1, height, width)
    if mixer.gate == "sigmoid":
        gate = (
            torch.einsum("oc,chw->ohw", mixer.gate_proj.weight[:, :, 0, 0], x[0]) + mixer.gate_proj.bias[:, None, None]
        )
        out = out * gate.sigmoid()
    return out


@pytest.mark.parametrize("scope", ["both", "local", "global"])
@pytest.mark.parametrize("gate", ["none", "value", "sigmoid"])
@pytest.mark.parametrize("size", [(4, 5), (1, 1), (2, 7)])
def test_equals_the_definition(scope, gate, size):
    mixer = make(scope=scope, gate=gate)
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_gradients_are_those_of_finite_differences(gate):
    mixer = make(gate=gate)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_a_far_pixel_matters_globally_but_not_locally():
    x = torch.randn(1, 6, 9, 9, dtype=torch.float64)
    changed = x.clone()
    changed[..., 8, 8] += 1
    differs = {
        scope: (make(scope=scope)(x) - make(scope=scope)(changed)).abs().sum(1)[0] for scope in ("local", "global")
    }
    assert (differs["global"] > 0).all()
    assert (differs["local"][7:, 7:] > 0).all() and differs["local"][:7].sum() == 0 == differs["local"][:, :7].sum()


def test_pixels_may_be_permuted_globally_and_equal_logits_are_means():
    mixer = make(scope="global")
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    order = torch.randperm(20)
    torch.testing.assert_close(mixer(x.flatten(2)[..., order].view_as(x)).flatten(2), mixer(x).flatten(2)[..., order])
    for scope in ("local", "global"):
        mixer = make(scope=scope)
        torch.nn.init.zeros_(mixer.saliency)
        values = mixer.kv(x)[:, 6:]
        mean = values.mean((2, 3), keepdim=True).expand_as(values)
        box = F.avg_pool2d(values, 3, 1, 1, count_include_pad=False)
        torch.testing.assert_close(mixer(x), box if scope == "local" else mean)


def test_large_logits_stay_finite():
    mixer = make(scope="both").float()
    x = 100 * torch.randn(1, 6, 8, 8)
    x.requires_grad_()
    out = mixer(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"num_heads": 4}, {"scope": "far"}, {"gate": "door"}])
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        KeyOnlyMixer(6, 8, **{"num_heads": 2, **options})
