"""LesaMixer against its definition, one pixel, head and key at a time."""

import io
import math

from halodet.mixers import LesaMixer
from halodet.models.halonet import group_norm

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

SIZES = [(5, 4), (1, 2), (4, 7), (3, 3)]


def make(seed, **options):
    torch.manual_seed(seed)
    options = {"num_heads": 2, "block_size": 3, "halo_size": 1, **options}
    mixer = LesaMixer(8, 6, **options).double()
    for name, tensor in [*mixer.named_parameters(), *mixer.named_buffers()]:
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.7)
    return mixer.eval()


def normalize(norm, values):
    """Normalize (B, C, n): by running statistics, in training by those of the values, or per image and group."""
    out = torch.empty_like(values)
    batch, channels, count = values.shape
    for b in range(batch):
        for c in range(channels):
            if isinstance(norm, nn.GroupNorm):
                width = channels // norm.num_groups
                over = values[b, c // width * width : (c // width + 1) * width].flatten()
            else:
                over = values[:, c].flatten()
            mean = sum(over) / len(over)
            var = sum((value - mean) ** 2 for value in over) / len(over)
            if isinstance(norm, FrozenBatchNorm2d) or not (norm.training or isinstance(norm, nn.GroupNorm)):
                mean, var = norm.running_mean[c], norm.running_var[c]
            for n in range(count):
                out[b, c, n] = norm.weight[c] * (values[b, c, n] - mean) / math.sqrt(var + norm.eps) + norm.bias[c]
    return out


def normalize_map(norm, x):
    return normalize(norm, x.flatten(2)).view_as(x)


def project(conv, x):
    return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x)


def keys_of(mixer, y, x, height, width):
    """Yield the pixels that the pixel (y, x) attends to."""
    for i in range(height):
        for j in range(width):
            if mixer.binary == "halo":
                block, halo = mixer.block_size, mixer.halo_size
                top, left = y // block * block - halo, x // block * block - halo
                if not (top <= i < top + block + 2 * halo and left <= j < left + block + 2 * halo):
                    continue
            yield i, j


def local_branch(mixer, x):
    batch, channels, height, width = x.shape
    grouped = mixer.unary[0]
    out = torch.zeros(batch, grouped.weight.shape[0], height, width, dtype=x.dtype)
    depth = grouped.weight.shape[1]
    for o in range(out.shape[1]):
        first = o // (out.shape[1] // (channels // depth)) * depth
        for y in range(height):
            for z in range(width):
                for i in range(max(0, y - 1), min(height, y + 2)):
                    for j in range(max(0, z - 1), min(width, z + 2)):
                        kernel = grouped.weight[o, :, i - y + 1, j - z + 1]
                        out[:, o, y, z] += x[:, first : first + depth, i, j] @ kernel
    if len(mixer.unary) == 3:
        out = project(mixer.unary[1], out)
    return normalize_map(mixer.unary[-1], out)


def attention_branch(mixer, x):
    batch, _, height, width = x.shape
    heads, depth, value_depth, last = mixer.num_heads, mixer.depth, mixer.value_depth, mixer.table_size - 1
    qkv = normalize_map(mixer.qkv[1], project(mixer.qkv[0], x))
    rel_h, rel_w = mixer.pos_embed.height_rel, mixer.pos_embed.width_rel
    pairs = [(y, z, i, j) for y in range(height) for z in range(width) for i, j in keys_of(mixer, y, z, height, width)]
    logits = torch.zeros(batch, 2 * heads, len(pairs), dtype=x.dtype)
    values = []
    for h in range(heads):
        start = h * (2 * depth + value_depth)
        q, k, v = qkv[:, start:][:, : 2 * depth + value_depth].split((depth, depth, value_depth), 1)
        values.append(v)
        for n, (y, z, i, j) in enumerate(pairs):
            down, right = max(-last, min(last, i - y)), max(-last, min(last, j - z))
            for b in range(batch):
                logits[b, h, n] = q[b, :, y, z] @ k[b, :, i, j]
                logits[b, heads + h, n] = q[b, :, y, z] @ (rel_h[down + last] + rel_w[right + last])
    logits = normalize(mixer.norm_logits, logits)
    out = torch.zeros(batch, heads, value_depth, height, width, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            powers = [math.exp(logits[b, h, n] + logits[b, heads + h, n]) for n in range(len(pairs))]
            total = torch.zeros(height, width, dtype=x.dtype)
            for power, (y, z, _, _) in zip(powers, pairs, strict=True):
                total[y, z] += power
            for power, (y, z, i, j) in zip(powers, pairs, strict=True):
                out[b, h, :, y, z] += power / total[y, z] * values[h][b, :, i, j]
    return normalize_map(mixer.norm_binary, out.flatten(1, 2))


def reference(mixer, x):
    """Compute the output of a (B, C, H, W) map of stride 1."""
    with torch.no_grad():
        u, b = local_branch(mixer, x), attention_branch(mixer, x)
        hidden = torch.cat((u, b), 1).clamp(min=0)
        hidden = normalize_map(mixer.gate[2], project(mixer.gate[1], hidden)).clamp(min=0)
        gate = normalize_map(mixer.gate[5], project(mixer.gate[4], hidden))
        return u + b / (1 + (-gate).exp())


def image(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, height, width, dtype=torch.float64, generator=generator)


def force_gate(mixer, value):
    """Make the gate of all pixels ``value``, 0 or 1."""
    nn.init.zeros_(mixer.gate[5].weight)
    nn.init.constant_(mixer.gate[5].bias, 1000.0 if value else -1000.0)
    return mixer


@pytest.mark.parametrize("options", [{}, {"binary": "global", "table_size": 3}, {"num_heads": 1, "table_size": 2}])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_definition(options, size):
    mixer, x = make(0, **options), image(*size)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm, FrozenBatchNorm2d])
@pytest.mark.parametrize("binary", ["halo", "global"])
def test_training_normalizes_over_the_pairs_inside_the_map(binary, norm):
    mixer, x = make(1, binary=binary, norm=norm).train(), image(5, 4, batch=2)
    expected = reference(mixer, x)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), expected, rtol=1e-11, atol=1e-11)


def test_group_norm_of_logits_leaves_out_padding_in_inference_too():
    mixer, x = make(2, norm=group_norm), image(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block", [5, 8])
def test_one_block_is_global_attention_whatever_its_padding(block, training):
    """Running statistics agree too: padding takes no part in them."""
    x = image(5, 4, batch=2)
    halo = make(3, block_size=block, halo_size=0, table_size=5).train(training)
    whole = make(4, binary="global", table_size=5).train(training)
    whole.load_state_dict(halo.state_dict())
    torch.testing.assert_close(halo(x), whole(x), rtol=1e-12, atol=1e-12)
    for (name, one), other in zip(halo.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("binary", ["halo", "global"])
def test_gate_selects_the_branches(binary):
    mixer, x = make(5, binary=binary), image(4, 5)
    with torch.no_grad():
        u, b = local_branch(mixer, x), attention_branch(mixer, x)
        torch.testing.assert_close(force_gate(mixer, 0)(x), mixer.unary(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(force_gate(mixer, 1)(x), u + b, rtol=1e-12, atol=1e-12)


def test_halo_sees_its_window_and_global_attention_the_map():
    x = image(9, 9)
    changed = x.clone()
    changed[..., 8, 8] += 1
    halo, whole = make(6), make(6, binary="global", table_size=4)
    assert (halo(x) != halo(changed)).any(1)[0].nonzero().min() == 6  # blocks of 3 with a halo of 1
    assert (whole(x) != whole(changed)).any(1).all()
    changed = x.clone()
    changed[..., 3, 3] += 1
    assert (halo(x) != halo(changed)).any(1)[0, :6, :6].all()


@pytest.mark.parametrize("binary", ["halo", "global"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_finite_differences(binary, training):
    mixer = make(7, binary=binary, table_size=4).train(training)
    x = image(4, 3, batch=2).requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_stride_2_averages_the_output():
    mixer, x = make(8), image(5, 4)
    strided = make(8, stride=2)
    full, half = mixer(x), strided(x)
    torch.testing.assert_close(half[..., 0, 0], full[..., :2, :2].mean((-2, -1)))
    torch.testing.assert_close(half[..., 2, 1], full[..., 4:, 2:].mean((-2, -1)))


def test_table_resizes_by_offset():
    small, large = make(9, table_size=3), make(10, table_size=5)
    table = torch.arange(5.0)[:, None].expand(5, 2)
    assert small.infer_rel_pos_layout(9, {}) == large.rel_pos_layout() == {"table_size": 5}
    resized = large.resize_rel_pos(table, small.rel_pos_layout())
    assert resized[:, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    assert torch.equal(small.resize_rel_pos(resized, large.rel_pos_layout()), table)


@pytest.mark.parametrize(
    "options",
    [{"num_heads": 3}, {"num_heads": 0}, {"binary": "both"}, {"block_size": 0}, {"halo_size": -1}, {"table_size": 0}],
)
def test_options_that_do_not_fit_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LesaMixer(8, 6, **{"num_heads": 2, **options})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Exporting aten..index:UserWarning")
@pytest.mark.parametrize("binary", ["halo", "global"])
def test_onnx_runtime_agrees_at_any_size(binary):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    mixer, file = make(11, binary=binary, stride=2).float(), io.BytesIO()
    axes = {"x": {2: "height", 3: "width"}}
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(mixer, (image(5, 7).float(),), file, dynamo=False, dynamic_axes=axes, opset_version=17, **names)
    session = onnxruntime.InferenceSession(file.getvalue())
    for size in [(5, 7), (6, 3), (1, 1), (2, 10)]:
        x = image(*size).float()
        (actual,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), mixer(x).detach(), rtol=1e-4, atol=1e-4)
