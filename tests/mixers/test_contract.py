"""What every mixer supports: export at any size, compilation, activation checkpointing, padded batches."""

import io

from halodet.mixers import MIXERS, MixerSpec, build_mixer

import pytest
import torch
from torch.utils.checkpoint import checkpoint

SIZES = [(13, 21), (16, 8), (24, 30)]
# Mixers whose every output pixel depends on the whole map.
GLOBAL = {"botnet", "external", "key_only", "lambda", "plg"}


def make(name, **options):
    torch.manual_seed(0)
    spec = MixerSpec(16, 24, num_heads=4, block_size=4, halo_size=2, options=options)
    mixer = build_mixer(name, spec)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def image(height, width):
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(height))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_onnx_runtime_agrees_at_three_sizes(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    mixer = make(name).eval()
    file, axes = io.BytesIO(), {"x": {2: "height", 3: "width"}}
    torch.onnx.export(
        mixer, (image(*SIZES[0]),), file, dynamo=False, dynamic_axes=axes, opset_version=17, input_names=["x"]
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in SIZES:
        (actual,) = session.run(None, {"x": image(*size).numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), mixer(image(*size)).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_compiled_mixer_is_one_graph_with_the_same_gradients(name):
    mixer = make(name).eval()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    x = image(*SIZES[0]).requires_grad_()
    inputs = [x, *mixer.parameters()]
    plain, other = mixer(x), compiled(x)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (other, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_checkpointed_mixer_has_the_same_gradients(name):
    mixer = make(name).eval()
    x = image(*SIZES[0]).requires_grad_()
    inputs = [x, *mixer.parameters()]
    plain = torch.autograd.grad(mixer(x).sin().sum(), inputs)
    saving = torch.autograd.grad(checkpoint(mixer, x, use_reentrant=False).sin().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, saving, strict=True))


@pytest.mark.parametrize("name", sorted(set(MIXERS) - GLOBAL))
def test_padding_of_a_batch_reaches_no_further_than_the_neighborhood(name):
    """Zeros on the right, as for a wider image in the same batch, leave the pixels far from them unchanged."""
    mixer = make(name, **({"block_size": 4, "halo_size": 2} if name == "blockwise" else {})).double().eval()
    x = torch.randn(1, 16, 12, 48, dtype=torch.float64)
    with torch.no_grad():
        alone, together = mixer(x), mixer(torch.nn.functional.pad(x, (0, 24)))
    torch.testing.assert_close(together[..., :27], alone[..., :27], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("name", sorted(GLOBAL))
def test_global_mixers_are_those_that_a_far_pixel_changes(name):
    mixer = make(name).double().eval()
    x = torch.randn(1, 16, 12, 48, dtype=torch.float64)
    changed = x.clone()
    changed[..., 47] += 1
    with torch.no_grad():
        assert (mixer(x) - mixer(changed))[..., 0].abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("blockwise", "block_size", 8.0),
        ("elsa", "kernel_size", 7.0),
        ("external", "slots", 64.0),
        ("focal", "focal_window", -1),
        ("lambda", "key_channels", "16"),
        ("lesa", "table_size", 0),
        ("neighborhood", "dilation", 1.5),
        ("plg", "grid_size", 7.0),
        ("slide", "kernel_size", 2),
    ],
)
def test_options_of_another_type_or_range_are_named(name, option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r} is invalid"):
        make(name, **{option: value})
