"""tools/analyze_model.py: counts against counts by hand."""

import pytest
from detectron2.modeling import build_model
from helpers import cached_config, load_tool

tool = load_tool("analyze_model")


@pytest.fixture(scope="module")
def rows():
    model = build_model(cached_config("quick/mask_rcnn_halo_small")).eval()
    return model, {name: numbers for name, *numbers in tool.analyze(model, 96, 128)}


def test_parameters_add_up(rows):
    model, rows = rows
    assert rows["whole model"][0] * 1e6 == pytest.approx(sum(p.numel() for p in model.parameters()))
    stages = sum(rows[name][0] for name in ("stem", "res2", "res3", "res4", "res5"))
    assert rows["backbone"][0] == pytest.approx(stages)


def test_flops_and_activations_of_the_stem(rows):
    height, width, channels = 96 // 2, 128 // 2, 32
    _, flops, activations = rows[1]["stem"]
    assert flops * 1e9 == pytest.approx(
        height * width * channels * (3 * 7 * 7 + 5)
    )  # fvcore counts 5 for each element of a norm
    assert activations * 1e6 == pytest.approx(height * width * channels)


def test_attention_is_counted(rows):
    """res4 of a 96×128 image: one block of 8×8 with a window of 14×14 on 6×8; its first layer strides from 12×16."""
    _, flops, _ = rows[1]["res4"]
    width, heads, window, relative = 128, 8, 14 * 14, 2 * 14
    depth = width // heads
    at_stride_1 = heads * 64 * (2 * window * depth + relative * depth)
    strided = 4 * heads * 16 * (2 * window * depth + relative * depth)
    convolutions = 192 * (128 * 128) + 48 * 128 * 128 + 192 * 128 * 256 + 48 * 128 * 256 + 48 * 128 * 256
    convolutions += 48 * (256 * 128 + 128 * 128 + 128 * 256 + 128 * 256)
    assert flops * 1e9 == pytest.approx(at_stride_1 + strided + convolutions, rel=0.05)


@pytest.mark.parametrize("name", ["retinanet_halo_h4", "cascade_mask_rcnn_halo_h4", "mask_rcnn_r50"])
def test_other_detectors(name):
    small = [
        "MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)", "MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.RPN.POST_NMS_TOPK_TEST", 50,
    ]  # fmt: skip
    rows = {row: numbers for row, *numbers in tool.analyze(build_model(cached_config(name, *small)).eval(), 64, 96)}
    assert {"res3", "res5", "backbone", "backbone with FPN", "whole model"} <= set(rows)
    assert all(flops > 0 for _, flops, _ in rows.values())
    assert rows["whole model"][1] > rows["backbone with FPN"][1] > rows["backbone"][1] > rows["res5"][1]


@pytest.mark.parametrize("arguments", [["--size", "0", "10"], ["--size", "8", "8", "NO_SUCH_KEY", "1"]])
def test_invalid_arguments_exit_with_2(arguments, capsys):
    try:
        code = tool.main(["--config-file", "mask_rcnn_halo_h0", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert ("NO_SUCH_KEY" if len(arguments) > 3 else "--size") in capsys.readouterr().err.splitlines()[-1]
