"""tools/gpu_check.py: the steps at their smallest sizes on the CPU, failed steps, and no GPU."""

import json
import sys

import pytest
import torch
from helpers import load_tool

tool = load_tool("gpu_check")


@pytest.mark.slow
@pytest.mark.usefixtures("shapes")
def test_all_steps_on_the_cpu(tmp_path, monkeypatch, capsys):
    """All commands in process; the Triton tests are part of this suite anyway."""
    from conftest import restore_process

    def run(command, log, timeout):
        if "pytest" in command:
            return 0
        with restore_process():
            return load_tool(command[1].removeprefix("tools/").removesuffix(".py")).main(command[2:])

    monkeypatch.setattr(tool, "run_command", run)
    assert tool.main(["--device", "cpu", "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["environment"]["torch"] in torch.__version__ and "timm" in report["environment"]
    assert len(report["steps"]) == 6 and all(step["exit_code"] == 0 for step in report["steps"])
    table = (tmp_path / "gpu_check.md").read_text()
    for text in ("1×64×5×6 b4 h1", "halo_small", "loss ", "bfloat16", "float32"):
        assert text in table


def test_failed_steps_are_recorded_and_the_others_run(tmp_path, monkeypatch, capsys):
    def steps(output, device):
        code = "print('first'); print('last'); raise SystemExit(3)"
        return [
            tool.Step("a, b", [sys.executable, "-c", code], 30),
            tool.Step("endless", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2),
            tool.Step("good", [sys.executable, "-c", ""], 30),
        ]

    monkeypatch.setattr(tool, "make_steps", steps)
    assert tool.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    first, endless, good = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert first["exit_code"] == 3 and first["last_lines"] == ["first", "last"]
    assert endless["exit_code"] is None and endless["status"] == "timed out" and endless["seconds"] < 30
    assert good["exit_code"] == 0
    assert "last" in (tmp_path / "gpu_check.md").read_text()


def test_missing_implementations_are_listed(monkeypatch):
    monkeypatch.setattr(tool, "is_installed", lambda name: name != "timm")
    modes = {mode: {"halodet": {"ms": 1.0, "ratio": 1.0}} for mode in tool.MODES}
    record = {"name": "attention benchmark", "exit_code": 0, "status": "passed", "seconds": 1, "last_lines": []}
    rows = {row[2]: row for row in tool.make_rows({**record, "results": {"results": {"case": modes}}})}
    assert "not installed" in rows["timm"] and "1.0 ms (1.00×)" in rows["halodet"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert tool.main(["--output", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
