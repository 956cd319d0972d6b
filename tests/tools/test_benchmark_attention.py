"""tools/benchmark_attention.py: files, failures and invalid arguments."""

import json

import pytest
from helpers import load_tool

tool = load_tool("benchmark_attention")
SMALL = ["--map", "128x6x9", "--block", "4,1", "--rounds", "2", "--device", "cpu"]


def test_writes_results_table_and_chart(tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("torch.nn.attention.flex_attention")
    # FlexAttention has no backward on the CPU.
    assert tool.main([*SMALL, "--implementations", "timm", "flex-attention", "--output", str(tmp_path)]) == 0
    ((case, results),) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"].items()
    assert case == "1×128×6×9 b4 h1"
    for mode in ("forward", "forward+backward"):
        assert results[mode]["halodet"]["ratio"] == 1.0
        assert results[mode]["timm"]["ms"] > 0 and results[mode]["timm"]["ratio"] > 0
    assert "backward" in results["forward+backward"]["flex-attention"]["failed"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        case in table and "geometric mean" in table and results["forward+backward"]["flex-attention"]["failed"] in table
    )
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert table.split("\n\n", 1)[1] in capsys.readouterr().out


def test_exit_code_is_1_if_halodet_failed(tmp_path, monkeypatch):
    def build_call(*arguments):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(tool, "build_call", build_call)
    assert tool.main([*SMALL, "--implementations", "halodet", "--output", str(tmp_path)]) == 1


def test_operators_beside_a_convolution(tmp_path, capsys):
    arguments = ["--map", "16x6x9", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert tool.main(["--operators", "elsa", "conv", *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    assert list(results) == ["elsa 1×16×6×9", "conv 1×16×6×9"]
    elsa, conv = results.values()
    assert elsa["parameters"] > 0 and conv["multiply_adds"] == 9 * 16 * 16 * 54
    assert set(elsa["forward"]) == {"halodet", "straightforward", "lower bound", "3×3 convolution"}
    table = (tmp_path / "table.md").read_text(encoding="utf-8").split("\n\n", 1)[1]
    assert "| elsa " in table and "| conv " in table and table in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--block", "4,1"], ["--backend", "unfold"], ["--border", "mask"]])
def test_options_of_halo_attention_do_not_apply_to_operators(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--operators", "--output", str(tmp_path), *option])
    assert f"argument {option[0]}: not allowed with argument --operators" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--operators", "lambad"],
        ["--size", "800"],
        ["--map", "100x8x8"],
        ["--block", "0,1"],
        ["--block", "a"],
        ["--batch", "0"],
        ["--backend", "cuda"],
        ["--device", "cuda:99"],
        ["--output", __file__],
    ],
)
def test_invalid_arguments_exit_with_2(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--output", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert f"argument {arguments[0]}: " in capsys.readouterr().err.splitlines()[-1]
