"""The kill test itself, with fewer kills: a run that is killed goes on to the same bits, and other bits are told."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_with_the_same_bits(tmp_path):
    command = [sys.executable, ROOT / "tools" / "kill_test.py", "--kills", "2", "--iterations", "8", "--seed", "1"]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "seed 1: 2 of 2 bit-equal" in run.stdout and run.stdout.count("entries that differ: 0") == 2


def test_what_differs_is_named():
    specification = importlib.util.spec_from_file_location("kill_test", ROOT / "tools" / "kill_test.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    left = {"model": {"w": torch.zeros(2)}, "started": 1.0, "state": [1, {"a": 2.0}]}
    assert tool.differing(left, {"model": {"w": torch.zeros(2)}, "started": 2.0, "state": [1, {"a": 2.0}]}) == []
    assert tool.differing(
        left, {"model": {"w": torch.tensor([0.0, 1e-45])}, "started": 1.0, "state": [1, {"a": 3.0}]}
    ) == [
        ".model.w",
        ".state.1.a",
    ]
