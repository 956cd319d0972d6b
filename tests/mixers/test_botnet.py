"""BoTNetMixer against timm at the size of its tables, and against a slow definition at other sizes."""

from halodet.mixers.botnet import BoTNetMixer, interpolate_rel_pos

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_equals_timm_at_the_size_of_its_tables(stride, size):
    bottleneck_attn = pytest.importorskip("timm.layers.bottleneck_attn", reason="timm is not installed")
    theirs = bottleneck_attn.BottleneckAttn(24, 48, feat_size=size, stride=stride, num_heads=4, dim_head=8).double()
    ours = BoTNetMixer(24, 48, table_size=size, stride=stride, num_heads=4, qk_channels=32).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 24, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours(x))
    for a, b in zip(
        *(torch.autograd.grad((m(x) * weight).sum(), list(m.parameters())) for m in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def reference(mixer, x, side_of):
    """Compute the output pixel by pixel for a (1, C, H, W) map, reading the tables with numpy's interpolation."""
    q, k, v = torch.einsum("oc,chw->ohw", mixer.qkv.weight[:, :, 0, 0], x[0]).split(
        (mixer.qk_channels, mixer.qk_channels, mixer.out_channels)
    )
    heads, (height, width) = mixer.num_heads, x.shape[-2:]

    def row(table, offset, side):
        last = (table.shape[0] - 1) // 2
        places = np.arange(-last, last + 1) * ((side - 1) / max(last, 1) if mixer.position == "interpolate" else 1.0)
        return torch.tensor([np.interp(offset, places, column) for column in table.detach().numpy().T])

    out = torch.zeros(mixer.out_channels, height, width, dtype=x.dtype)
    for y in range(height):
        for z in range(width):
            for h in range(heads):
                qh, kh, vh = (t.reshape(heads, -1, height, width)[h] for t in (q, k, v))
                logits = torch.stack(
                    [
                        qh[:, y, z] @ kh[:, i, j] * mixer.depth**-0.5
                        + qh[:, y, z] @ row(mixer.pos_embed.height_rel, i - y, side_of[0])
                        + qh[:, y, z] @ row(mixer.pos_embed.width_rel, j - z, side_of[1])
                        for i in range(height)
                        for j in range(width)
                    ]
                )
                out.reshape(heads, -1, height, width)[h, :, y, z] = vh.flatten(1) @ logits.softmax(0)
    return out[None]


@pytest.mark.parametrize("position", ["interpolate", "offset"])
@pytest.mark.parametrize("size", [(5, 7), (3, 2), (4, 4), (6, 8)])
def test_other_sizes_equal_the_definition(position, size):
    mixer = BoTNetMixer(6, 8, table_size=(4, 4), num_heads=2, qk_channels=4, position=position).double()
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x, size), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["traced", "exported"])
@pytest.mark.parametrize("traced_at", [(4, 4), (6, 3)], ids=["table size", "another size"])
def test_one_graph_takes_any_size(form, traced_at):
    """Regression: a graph traced on a square map attended within windows of a wider one."""
    mixer = BoTNetMixer(6, 8, table_size=(4, 4), num_heads=2, qk_channels=4, stride=2).double().eval()
    example = torch.randn(1, 6, *traced_at, dtype=torch.float64)
    if form == "traced":
        graph = torch.jit.trace(mixer, example, check_trace=False)
    else:
        sizes = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
        graph = torch.export.export(mixer, (example,), dynamic_shapes=sizes).module()
    with torch.no_grad():
        for size in [(4, 4), (5, 9), (3, 8), *([(1, 1)] if form == "traced" else [])]:
            x = torch.randn(1, 6, *size, dtype=torch.float64)
            torch.testing.assert_close(graph(x), mixer(x), rtol=1e-10, atol=1e-10)


def test_windows_equal_separate_maps():
    whole = BoTNetMixer(16, 16, table_size=(4, 4), num_heads=2).double()
    windowed = BoTNetMixer(16, 16, table_size=(4, 4), num_heads=2, window=4).double()
    windowed.load_state_dict(whole.state_dict())
    x = torch.randn(2, 16, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        out = windowed(x)
        for y in range(0, 8, 4):
            for z in range(0, 12, 4):
                torch.testing.assert_close(
                    out[..., y : y + 4, z : z + 4], whole(x[..., y : y + 4, z : z + 4]), rtol=1e-12, atol=1e-12
                )
        assert (out - whole(x)).abs().max() > 1e-3


def test_block_larger_than_the_map_changes_nothing():
    """On a GPU, blocks are rounded up so that image sizes share kernels."""
    table = torch.randn(15, 3, dtype=torch.float64)
    for position in ("interpolate", "offset"):
        exact, rounded = (interpolate_rel_pos(table, 11, block, position) for block in (11, 16))
        torch.testing.assert_close(rounded[5:-5], exact, rtol=0, atol=0)


def test_invalid_values_are_named():
    with pytest.raises(ValueError, match="table_size"):
        BoTNetMixer(16, 16, table_size=(0, 8))
    with pytest.raises(ValueError, match="position='nearest'"):
        BoTNetMixer(16, 16, table_size=(8, 8), position="nearest")
    with pytest.raises(ValueError, match="num_heads=3"):
        BoTNetMixer(16, 16, table_size=(8, 8), num_heads=3)
    with pytest.raises(ValueError, match="backend='magic'"):
        BoTNetMixer(16, 16, table_size=(8, 8), backend="magic")
