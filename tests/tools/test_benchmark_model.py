"""tools/benchmark_model.py: files, models that fail and invalid arguments."""

import json

import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from helpers import load_tool
from torch import nn

tool = load_tool("benchmark_model")
SMALL = "quick/mask_rcnn_halo_small"


class Broken(Backbone):
    """Backbone that fails in its forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 256, 1)

    def forward(self, x):
        raise RuntimeError("no kernel for this\nand a long explanation")

    def output_shape(self):
        return {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in range(2, 7)}


def unbuildable():
    raise ImportError("No module named 'elsewhere'")


def test_files_and_failures(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tool.models.DETECTRON2, "broken", Broken)
    monkeypatch.setitem(tool.models.DETECTRON2, "unbuildable", unbuildable)
    peaks = []
    monkeypatch.setattr(tool, "peak_memory", lambda build, *args, device: peaks.append(args[:3]) or {"peak_mib": 7})
    output = tmp_path / "new" / "folder"
    arguments = ["--config-file", SMALL, "--models", "broken", "unbuildable", "--rounds", "2", "--kind", "backbone"]
    arguments += ["--size", "40x70", "--device", "cpu", "--memory", "--output", str(output)]
    assert tool.main(arguments) == 0
    results = json.loads((output / "results.json").read_text())["results"]["backbone"]
    assert list(results) == [SMALL, "broken", "unbuildable"]
    for mode in ("forward", "training"):
        assert results[SMALL][mode]["ratio"] == 1 and results[SMALL][mode]["ms"] > 0
        assert results["broken"][mode] == {"failed": "no kernel for this"}
    assert results["unbuildable"] == {"failed": "No module named 'elsewhere'"}
    assert results[SMALL]["memory"] == {"peak_mib": 7} and peaks == [(SMALL, "backbone", "training")]
    table = (output / "table.md").read_text()
    for text in ("1×3×40×70, float32", "GN", "7 MiB", "broken, training: no kernel for this", "unbuildable: No module"):
        assert text in table
    assert (output / "ratios.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert table.split("\n\n", 1)[1] in out and "a long explanation" not in out


def test_default_models(tmp_path):
    args = tool.parse(["--output", str(tmp_path)])
    assert args.names == [*tool.models.OURS, "R50-FPN", "Swin-T-FPN", "ViTDet-B"] and args.reference == "R50-FPN"
    args = tool.parse(["--config-file", SMALL, "--models", "Swin-T-FPN", "--output", str(tmp_path)])
    assert args.names == [SMALL, "Swin-T-FPN"] and args.reference == SMALL
    args = tool.parse(["--config-file", SMALL, "--output", str(tmp_path)])
    assert args.names == [SMALL, "R50-FPN", "Swin-T-FPN", "ViTDet-B"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "800"], "--size"),
        (["--size", "16x800"], "--size"),
        (["--batch", "0"], "--batch"),
        (["--device", "gpu"], "--device"),
        (["--models", "R50"], "--models"),
        (["--models", "ViTDet-B", "--reference", "R50-FPN"], "--reference"),
        (["--config-file", "mask_rcnn_halo_h44"], "mask_rcnn_halo_h44"),
        (["--config-file", "retinanet_halo_h4"], "p7"),
        (["--output", __file__], "--output"),
    ],
)
def test_invalid_arguments_exit_with_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.parse(["--output", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
