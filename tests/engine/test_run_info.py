"""The record of a run's starts, and that its saved config repeats it."""

import json
import shutil
import subprocess
from pathlib import Path

import halodet
from halodet.engine.run_info import add_start, git_state

import pytest
import torch
import yaml


def losses(rows):
    return [{name: value for name, value in row.items() if "loss" in name} for row in rows if "total_loss" in row]


def seed_of(output):
    return yaml.safe_load((output / "config.yaml").read_text())["SEED"]


def starts(output):
    return json.loads((output / "run.json").read_text())


def weights(output):
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def test_the_saved_config_repeats_the_run(tmp_path, train_net, metrics):
    assert train_net(tmp_path / "run", "SOLVER.BASE_LR", "0.003", "SEED", "-1", "DATASETS.TEST", "()") == 0
    assert train_net(tmp_path / "again", config=tmp_path / "run/config.yaml", tiny=()) == 0
    assert seed_of(tmp_path / "run") == seed_of(tmp_path / "again") >= 0
    assert losses(metrics(tmp_path / "run")) == losses(metrics(tmp_path / "again"))
    first, second = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_starts_are_recorded(tmp_path, train_net, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_net.py", "--config-file", "my config.yaml"])
    output = tmp_path / "run"
    assert train_net(output, "SEED", "-1", "SOLVER.MAX_ITER", "2") == 0
    seed, config = seed_of(output), (output / "config.yaml").read_text()
    assert train_net(output, "MODEL.WEIGHTS", output / "model_final.pth", flags=["--eval-only"]) == 0
    assert (output / "config.yaml").read_text() == config, "an evaluation must not replace the config"
    assert train_net(output, "SEED", "-1", "SOLVER.MAX_ITER", "3", flags=["--resume"]) == 0
    assert [(s["eval_only"], s["resumed"]) for s in starts(output)] == [(False, False), (True, False), (False, True)]
    assert starts(output)[0]["seed"] == starts(output)[2]["seed"] == seed == seed_of(output)
    for start in starts(output):
        assert start["command"].endswith("train_net.py --config-file 'my config.yaml'") and start["processes"] == 1
        assert start["versions"]["halodet"] == halodet.__version__ and torch.__version__.startswith(
            start["versions"]["torch"]
        )
        assert any("detectron2" in line for line in start["environment"])
        assert start["git"] == git_state(Path(halodet.__file__).parent)


def test_git_state_of_a_checkout(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run = subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True)
        return run.stdout.strip()

    package = tmp_path / "halodet"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    assert git_state(package) is None
    git("init", "-q")
    assert git_state(package) is None, "the repository does not track it"
    git("add", ".")
    git("commit", "-qm", "first")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("a = 2\n")
    assert git_state(package)["dirty"]


@pytest.mark.parametrize("text", ["[{", "{}", "[3]"])
def test_an_unreadable_record_is_kept_as_a_backup(tmp_path, text, caplog):
    path = tmp_path / "run.json"
    path.write_text(text)
    add_start(path, {"seed": 1})
    assert [start["seed"] for start in starts(tmp_path)] == [1] and (tmp_path / "run.damaged.json").read_text() == text
    assert "run.damaged.json" in caplog.text
