"""The environment report with all dependencies and with a missing or broken one."""

import subprocess
import sys

from halodet.utils import collect_env

from helpers import ROOT, run_code


def report_with(folder, *missing):
    """The report with modules in ``folder`` in place of those installed, and without the missing ones."""
    code = f"""
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.orig_argv += ["-m", "halodet.utils.collect_env"]
runpy.run_module("halodet.utils.collect_env", run_name="__main__")
"""
    if not missing:
        return run_code(code, folder, folder, ROOT)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_complete_environment(capsys):
    assert collect_env.main() == 0
    report = capsys.readouterr().out
    for word in ("halodet", "torch", "torchvision", "detectron2", "cpu: "):
        assert word in report
    assert "MISSING" not in report


def test_missing_dependency_is_listed_with_its_fix(tmp_path):
    (tmp_path / "detectron2.py").write_text("raise ImportError('libsomething is not here')\n")
    report = report_with(tmp_path)
    assert report.returncode == 1
    assert "missing: detectron2 cannot be imported (ImportError: libsomething is not here)" in report.stdout
    assert "tools/install_detectron2.py" in report.stdout and "Traceback" not in report.stdout + report.stderr


def test_without_pytorch_a_runtime_is_enough(tmp_path):
    training = ("torch", "torchvision", "detectron2", "fvcore", "pycocotools", "safetensors")
    report = report_with(tmp_path, *training)
    assert report.returncode == 0 and "training only" in report.stdout, report.stderr
    assert "halodet[train]" in report.stdout and "MISSING" not in report.stdout
    report = report_with(tmp_path, *training, "cv2")
    assert report.returncode == 1 and "missing: opencv-python" in report.stdout
    assert report_with(tmp_path, *training, "onnxruntime", "openvino").returncode == 1


def test_torch_and_torchvision_of_different_builds(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    report = report_with(tmp_path)
    assert report.returncode == 1 and "Traceback" not in report.stdout + report.stderr
    assert "operator torchvision::nms does not exist" in report.stdout and "same index" in report.stdout


def test_missing_lazy_dependency_of_detectron2(tmp_path):
    (tmp_path / "omegaconf.py").write_text("raise ImportError('no omegaconf here')\n")
    report = report_with(tmp_path)
    assert report.returncode == 1 and "no omegaconf here" in report.stdout


def test_broken_detectron2_raises_its_own_error_with_the_fix(tmp_path):
    (tmp_path / "detectron2.py").write_text("raise ImportError('libsomething is not here')\n")
    run = run_code("import halodet", tmp_path, tmp_path, ROOT)
    assert run.returncode == 1 and "ImportError: libsomething is not here" in run.stderr
    assert sys.version_info < (3, 11) or "halodet.utils.collect_env" in run.stderr


def test_coco_is_searched_where_detectron2_searches(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    collect_env.main()
    assert f"not in {tmp_path}" in capsys.readouterr().out
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").touch()
    collect_env.main()
    assert f"found in {tmp_path}" in capsys.readouterr().out
