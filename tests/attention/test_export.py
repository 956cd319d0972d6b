"""Compiled, exported and checkpointed attention against eager mode; one exported graph works for all map sizes."""

import functools
import io

from halodet.mixers.halo import HaloMixer

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = [(13, 22), (6, 31), (40, 16), (3, 4), (4, 9)]  # the block size divides the third; the fourth is one block
LAYERS = {
    "mask": {"border": "mask"},
    "zero, stride 2": {"border": "zero", "stride": 2},
    "pooled": {"border": "zero", "stride": 2, "block_size": 5},
}


def layer(case):
    torch.manual_seed(0)
    return HaloMixer(16, 24, **{"num_heads": 2, "block_size": 4, "halo_size": 2, **LAYERS[case]}).eval()


def image(height, width):
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(height))


# Without Dim.AUTO, dynamic sizes must be provable.
needs_auto = pytest.mark.skipif(
    not hasattr(torch.export.Dim, "AUTO"), reason="this PyTorch has no torch.export.Dim.AUTO"
)


@functools.cache
def exported(case, size=SIZES[0]):
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    return torch.export.export(layer(case), (image(*size),), dynamic_shapes=(sizes,))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@needs_auto
@pytest.mark.parametrize("size", [SIZES[0], SIZES[3]], ids=["several blocks", "one block"])
@pytest.mark.parametrize("case", LAYERS)
def test_exported_program_takes_any_size(case, size):
    """Regression: a program exported with one block took no map of several, and the reverse."""
    mixer, program = layer(case), exported(case, size).module()
    for size in SIZES:
        torch.testing.assert_close(program(image(*size)), mixer(image(*size)), rtol=1e-5, atol=1e-5)


@needs_auto
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:Exporting aten..index:UserWarning", "ignore:Constant folding:UserWarning"
)
@pytest.mark.parametrize("size", [(13, 22), (64, 64)], ids=["13x22", "64x64"])
@pytest.mark.parametrize("exporter", ["TorchScript", "torch.export"])
@pytest.mark.parametrize("case", ["mask", "zero, stride 2"])
def test_onnx_runtime_agrees_at_any_size(case, exporter, size):
    """The larger example is a whole number of blocks."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    mixer, file = layer(case), io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"]}
    if exporter == "torch.export":
        torch.onnx.export(exported(case, size), dynamo=True, verbose=False, **names).save(file)
    else:
        axes = {"x": {2: "height", 3: "width"}}
        torch.onnx.export(mixer, (image(*size),), file, dynamo=False, dynamic_axes=axes, opset_version=17, **names)
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in SIZES:
        (actual,) = session.run(None, {"x": image(*size).numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), mixer(image(*size)).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_compiled_layer_is_one_graph_with_the_same_gradients(case):
    mixer = layer(case)
    dynamic = case == "zero, stride 2"  # symbolic sizes, which take longest to compile; the others have fixed ones
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in SIZES[: 2 if dynamic else 1]:
        x = image(*size).requires_grad_()
        inputs = [x, *mixer.parameters()]
        plain, other = mixer(x), compiled(x)
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (other, plain)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_inductor_gathers_every_query():
    """Regression: an earlier form of the gather lost queries beyond column 12."""
    mixer = HaloMixer(16, 16, num_heads=2, block_size=12, halo_size=2)
    network = nn.Sequential(mixer, nn.BatchNorm2d(16))
    x = torch.randn(2, 16, 12, 18, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (plain, *expected), (compiled, *gradients) = (
        [y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()])]
        for y in (run(x) for run in (network, torch.compile(network)))
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_checkpointed_layer_has_the_same_gradients():
    mixer, x = layer("mask"), image(13, 22).requires_grad_()
    inputs = [x, *mixer.parameters()]
    plain = torch.autograd.grad(mixer(x).sin().sum(), inputs)
    for a, b in zip(
        torch.autograd.grad(checkpoint(mixer, x, use_reentrant=False).sin().sum(), inputs), plain, strict=True
    ):
        assert torch.equal(a, b)
