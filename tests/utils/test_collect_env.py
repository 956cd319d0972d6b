"""The doctor's report, with everything there and with something missing."""

import os
import subprocess
import sys

import halodet

from helpers import ROOT


def run(**environment):
    return subprocess.run(
        [sys.executable, "-m", "halodet.utils.collect_env"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_report_names_what_is_here():
    report = run()
    assert report.returncode == 0, report.stdout
    for word in (halodet.__version__, "torch", "torchvision", "detectron2", "cpu: "):
        assert word in report.stdout
    assert "All that halodet needs is here." in report.stdout


def test_what_is_missing_comes_with_its_fix(tmp_path):
    # a broken package that is found first stands in for one that is not installed
    (tmp_path / "detectron2.py").write_text("raise ImportError('libsomething is not here')\n")
    report = run(PYTHONPATH=str(tmp_path))
    assert report.returncode == 1
    assert "missing: detectron2 does not import (ImportError: libsomething is not here)" in report.stdout
    assert "tools/install_detectron2.py" in report.stdout and "Traceback" not in report.stdout + report.stderr


def test_torch_and_torchvision_of_different_builds_are_told(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    report = run(PYTHONPATH=str(tmp_path))
    assert report.returncode == 1 and "Traceback" not in report.stdout + report.stderr
    assert "operator torchvision::nms does not exist" in report.stdout and "both from the same place" in report.stdout


def test_what_detectron2_imports_only_when_used_is_found_missing(tmp_path):
    (tmp_path / "omegaconf.py").write_text("raise ImportError('no omegaconf here')\n")
    report = run(PYTHONPATH=str(tmp_path))
    assert report.returncode == 1 and "no omegaconf here" in report.stdout


def test_broken_detectron2_raises_its_own_error_with_the_fix(tmp_path):
    (tmp_path / "detectron2.py").write_text("raise ImportError('libsomething is not here')\n")
    run = subprocess.run(
        [sys.executable, "-c", "import halodet"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert run.returncode == 1 and "ImportError: libsomething is not here" in run.stderr
    assert sys.version_info < (3, 11) or "halodet.utils.collect_env" in run.stderr


def test_coco_is_looked_for_where_detectron2_looks(tmp_path):
    assert f"not in {tmp_path}" in run(DETECTRON2_DATASETS=str(tmp_path)).stdout
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").touch()
    assert f"found in {tmp_path}" in run(DETECTRON2_DATASETS=str(tmp_path)).stdout
