"""tools/gpu_check.py without a GPU; its steps are tested in tests/benchmark/test_gpu_check.py."""

import pytest
import torch
from helpers import load_tool

tool = load_tool("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tool.main(["--output", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unknown_steps_exit_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--step", "unknown", "--output", str(tmp_path)])
    assert stop.value.code == 2 and "argument --step: " in capsys.readouterr().err
