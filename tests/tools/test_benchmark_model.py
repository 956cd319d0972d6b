"""The benchmark of models: what it writes, what it does about contenders that fail, and how it tells mistakes."""

import importlib.util
import json
from pathlib import Path

import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
spec = importlib.util.spec_from_file_location(
    "benchmark_model", Path(__file__).parents[2] / "tools" / "benchmark_model.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


SMALL, OTHER = "quick/mask_rcnn_halo_small", "quick/mask_rcnn_halo_shapes"


class Broken(Backbone):
    """Looks like a pyramid, and fails at the first image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 256, 1)

    def forward(self, x):
        raise RuntimeError("no kernel for this\nand a long explanation")

    def output_shape(self):
        return {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in range(2, 7)}


def unbuildable():
    raise ImportError("No module named 'elsewhere'")


@pytest.fixture
def contenders(monkeypatch):
    monkeypatch.setitem(tool.models.DETECTRON2, "broken", Broken)
    monkeypatch.setitem(tool.models.DETECTRON2, "unbuildable", unbuildable)


@pytest.fixture
def run(tmp_path):
    """Run the tool on small models; returns the results and the table."""

    def call(*argv):
        rest = [
            "--what",
            "backbone",
            "--size",
            "40x70",
            "--device",
            "cpu",
            "--memory",
            "--output",
            str(tmp_path / "new" / "folder"),
        ]
        assert tool.main([*argv, *rest]) == 0
        saved = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
        return saved["results"]["backbone"], (tmp_path / "new" / "folder" / "table.md").read_text()

    return call


def test_files_and_failures(contenders, run, monkeypatch, tmp_path, capsys):
    peaks = []
    monkeypatch.setattr(tool, "peak_memory", lambda build, *arguments, device: peaks.append(arguments[:3]) or 7 << 20)
    results, table = run("--config-file", SMALL, OTHER, "--contenders", "broken", "unbuildable", "--rounds", "2")
    assert list(results) == [SMALL, OTHER, "broken", "unbuildable"]
    for mode in ("forward", "training"):
        assert results[SMALL][mode]["ratio"] == 1 and results[SMALL][mode]["ms"] > 0
        assert results[OTHER][mode]["ratio"] > 0
        assert results["broken"][mode] == {"failed": "no kernel for this"}
    assert results["unbuildable"] == {"failed": "No module named 'elsewhere'", "memory": {}}
    assert results[OTHER]["memory"] == {"peak_mib": 7}
    assert peaks == [(SMALL, "backbone", "training"), (OTHER, "backbone", "training")]
    for text in (
        "1×3×40×70, float32",
        "GN",
        "7 MiB",
        "broken, training: no kernel for this",
        "unbuildable: No module named 'elsewhere'",
    ):
        assert text in table
    assert (tmp_path / "new" / "folder" / "ratios.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert table.split("\n\n", 1)[1] in out and "a long explanation" not in out
    assert "backbone with FPN, training: round 2 of 2; about" in out


def test_one_that_fails_later_leaves_the_others_their_figures(contenders, run, monkeypatch):
    calls = []

    def fail_at_the_third(self, x):
        calls.append(x)
        if len(calls) == 3:
            raise MemoryError
        return {f"p{level}": self.conv(x[..., :2, :2]) for level in range(2, 7)}

    monkeypatch.setattr(Broken, "forward", fail_at_the_third)
    monkeypatch.setattr(tool, "peak_memory", lambda *arguments, device: None)
    results, table = run("--config-file", SMALL, "--contenders", "broken", "--rounds", "2", "--reference", "broken")
    assert results["broken"]["forward"]["failed"] == "MemoryError"
    assert results[SMALL]["forward"]["ms"] > 0 and results[SMALL]["forward"]["ratio"] is None
    assert "broken, forward: MemoryError" in table and "MiB" not in table


def test_memory_that_cannot_be_measured_is_a_failure_of_that_figure_only(run, monkeypatch):
    def killed(*arguments, device):
        raise RuntimeError("the process ended with code -9")

    monkeypatch.setattr(tool, "peak_memory", killed)
    results, table = run("--config-file", SMALL, "--contenders", "Swin-T-FPN", "--rounds", "1")
    assert (
        results[SMALL]["memory"]["failed"] == "the process ended with code -9" and results[SMALL]["training"]["ms"] > 0
    )
    assert f"{SMALL}, memory: the process ended with code -9" in table


def test_default_contenders(tmp_path):
    args = tool.parse(["--output", str(tmp_path)])
    assert args.names == [*tool.models.OURS, "R50-FPN", "Swin-T-FPN", "ViTDet-B"] and args.reference == "R50-FPN"
    args = tool.parse(["--config-file", "mask_rcnn_halo_h1", "--contenders", "Swin-T-FPN", "--output", str(tmp_path)])
    assert args.names == ["mask_rcnn_halo_h1", "Swin-T-FPN"] and args.reference == "mask_rcnn_halo_h1"
    args = tool.parse(["--config-file", "mask_rcnn_halo_h1", "--output", str(tmp_path)])
    assert args.names == ["mask_rcnn_halo_h1", "R50-FPN", "Swin-T-FPN", "ViTDet-B"]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--size", "800"], "--size is 800"),
        (["--size", "16x800"], "at least 32"),
        (["--batch", "0"], "at least 1"),
        (["--device", "gpu"], "expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "counted from 0"),
        (["--contenders", "R50"], "no contender R50"),
        (["--contenders", "ViTDet-B", "--reference", "R50-FPN"], "no contender here"),
        (["--config-file", "mask_rcnn_halo_h44"], "there is no config mask_rcnn_halo_h44"),
        (["--config-file", "retinanet_halo_h4"], "p3, p4, p5, p6, p7"),
        (["--output", __file__], "cannot be written to"),
    ],
)
def test_mistakes_are_told_in_a_sentence(argv, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.parse(["--output", str(tmp_path), *argv])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
