"""The benchmark of attention layers as a command: what it writes, and what it says to bad arguments."""

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "benchmark_attention", Path(__file__).parents[2] / "tools" / "benchmark_attention.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

SMALL = ["--map", "128x6x9", "--block", "4,1", "--rounds", "2", "--device", "cpu"]


def test_writes_figures_table_and_chart(tmp_path, capsys):
    pytest.importorskip("timm")
    assert tool.main([*SMALL, "--contenders", "timm", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    (figures,) = results.values()
    for mode in ("forward", "training"):
        ours = figures[mode]["halodet"]
        assert ours["ratio"] == 1.0
        assert (
            ours["of_bound"] == max(ours["of_operations"], ours["of_bytes"])
            and min(ours["of_operations"], ours["of_bytes"]) > 0
        )
        assert figures[mode]["timm"]["ms"] > 0 and figures[mode]["timm"]["ratio"] > 0
    assert "1×128×6×9 b4 h1" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert "geometric mean" in capsys.readouterr().out


def test_a_contender_that_cannot_is_reported_with_its_reason(tmp_path, capsys):
    # FlexAttention has no backward on the CPU.
    pytest.importorskip("torch.nn.attention.flex_attention")
    assert tool.main([*SMALL, "--contenders", "flex-attention", "--output", str(tmp_path)]) == 0
    assert "training: flex-attention: FlexAttention does not support backward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "800"], "--size wants"),
        (["--map", "100x8x8"], "8 heads divide"),
        (["--block", "0,1"], "--block wants"),
        (["--block", "a"], "in whole numbers"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_backend_gets_one_sentence(tmp_path, capsys):
    assert tool.main([*SMALL, "--backend", "cuda", "--contenders", "halodet", "--output", str(tmp_path)]) == 2
    assert "backend is 'cuda'" in capsys.readouterr().err
