"""tools/timm_train.py: timm scripts can train halodet's models."""

import os
import subprocess
import sys

from halodet.checkpoint import read_checkpoint

import pytest
from helpers import ROOT, load_tool

SCRIPT = """
import argparse
from helper import KWARGS
import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--output")
    args = parser.parse_args()
    model = create_model(args.model, num_classes=2, **KWARGS)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    CheckpointSaver(model, optimizer, args=args, checkpoint_dir=args.output).save_checkpoint(0, metric=1.0)
"""


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "timm_train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_timm_script_trains_a_halodet_model(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("KWARGS = dict(base_width=16, num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1))\n")
    result = run(tmp_path / "train.py", "--model", "halodet_halonet_h0", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert checkpoint["arch"] == "halodet_halonet_h0" and "res4.0.mixer.q.weight" in checkpoint["model"]


def test_missing_script_exits_with_2(tmp_path, capsys):
    tool = load_tool("timm_train")
    assert tool.main([str(tmp_path / "none.py"), "--model", "x"]) == 2
    assert "none.py" in capsys.readouterr().err
    assert tool.main([]) == 2
