"""Thread defaults: set before PyTorch is imported, unless the user has set them."""

import os
import subprocess
import sys

from halodet.utils import threads

import pytest
from helpers import ROOT


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Write a control group hierarchy: (line of /proc/self/cgroup, file -> content)."""

    def write(line, files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "self").write_text(line)
        monkeypatch.setattr(threads, "CGROUP_ROOT", tmp_path)
        monkeypatch.setattr(threads, "CGROUP_FILE", tmp_path / "self")

    return write


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2.0),
        ("0::/host/path\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:memory:/x\n3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_cpu_quota(cgroup, line, files, expected):
    cgroup(line, files)
    assert threads.cpu_quota() == expected


@pytest.mark.parametrize(
    ("quota", "environment", "expected"),
    [
        ("300000", {}, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "3"}),
        ("50000", {}, {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}),
        ("900000", {}, {"GOMP_SPINCOUNT": "1000"}),
        ("max", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("300000", {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "5"}, {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "5"}),
    ],
)
def test_defaults_do_not_override_the_user(cgroup, monkeypatch, quota, environment, expected):
    cgroup("0::/\n", {"cpu.max": f"{quota} 100000"})
    monkeypatch.setattr(threads, "affinity_cpus", lambda: 4)
    monkeypatch.setattr(threads.os, "environ", environment)
    monkeypatch.delitem(sys.modules, "torch")
    threads.set_thread_defaults()
    assert environment == expected


def test_environment_is_set_before_torch_is_imported(tmp_path):
    # A stand-in for torch prints what it finds.
    (tmp_path / "torch.py").write_text("import os, sys; print(os.environ['GOMP_SPINCOUNT']); sys.exit(7)")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "analyze_model.py", "--help"],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert (run.returncode, run.stdout) == (7, "1000\n"), run.stderr
