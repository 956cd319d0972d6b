"""tools/kill_test.py with few kills: killed runs end with the same bits, and different bits are found."""

import pytest
import torch
from helpers import fork, load_tool, run_tool


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_runs_end_with_the_same_bits(tmp_path):
    arguments = ["--kills", "2", "--iterations", "8", "--seed", "1"]
    printed = tmp_path / "printed.txt"
    run = fork(run_tool, "kill_test", arguments, printed=printed, DETECTRON2_DATASETS=str(tmp_path))
    run.join(240)
    text = printed.read_text()
    assert run.exitcode == 0 and "seed 1: 2 of 2" in text and text.count("different entries: 0") == 2, text


def test_differing_entries_are_named():
    differing = load_tool("kill_test").differing
    left = {"model": {"w": torch.zeros(2)}, "started": 1.0, "state": [1, {"a": 2.0}]}
    right = {"model": {"w": torch.tensor([0.0, 1e-45])}, "started": 1.0, "state": [1, {"a": 3.0}]}
    assert differing(left, {"model": {"w": torch.zeros(2)}, "started": 2.0, "state": [1, {"a": 2.0}]}) == []
    assert differing(left, right) == [".model.w", ".state.1.a"]
