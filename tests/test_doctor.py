"""The doctor's report, with everything there and with something missing."""

import os
import subprocess
import sys

import halodet
from halodet import doctor


def run(**environment):
    return subprocess.run([sys.executable, "-m", "halodet.doctor"], capture_output=True, text=True, env={**os.environ, **environment})


def test_report_names_what_is_here():
    report = run()
    assert report.returncode == 0, report.stdout
    for word in (halodet.__version__, "torch", "torchvision", "detectron2", "cpu: "):
        assert word in report.stdout
    assert "All that halodet needs is here." in report.stdout


def test_what_is_missing_comes_with_its_mend(tmp_path):
    # a broken package that is found first stands in for one that is not installed
    (tmp_path / "detectron2.py").write_text("raise ImportError('libsomething is not here')\n")
    report = run(PYTHONPATH=str(tmp_path))
    assert report.returncode == 1
    assert "missing: detectron2 does not import (ImportError: libsomething is not here)" in report.stdout
    assert "tools/install_detectron2.py" in report.stdout and "Traceback" not in report.stdout + report.stderr


def test_torch_and_torchvision_of_different_builds_are_told(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "operators_work", lambda: "RuntimeError: operator torchvision::nms does not exist")
    assert doctor.main() == 1
    assert "torchvision::nms does not exist" in capsys.readouterr().out


def test_coco_is_looked_for_where_detectron2_looks(tmp_path):
    assert f"not in {tmp_path}" in run(DETECTRON2_DATASETS=str(tmp_path)).stdout
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").touch()
    assert f"found in {tmp_path}" in run(DETECTRON2_DATASETS=str(tmp_path)).stdout
