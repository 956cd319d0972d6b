"""tools/install_detectron2.py on a synthetic source wheel: names restored, patches applied, a valid wheel."""

import base64
import hashlib
import importlib.util
import random
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, load_tool

TOOL = ROOT / "tools" / "install_detectron2.py"


@pytest.fixture
def tool():
    return load_tool("install_detectron2")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "labgym.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("LabGym/__init__.py", "raise SystemExit('LabGym itself must not be imported')")
        wheel.writestr("LabGym/detectron2/__init__.py", "import LabGym.detectron2.data.common\n__version__ = '0.6'\n")
        wheel.writestr("LabGym/detectron2/data/__init__.py", "")
        wheel.writestr(
            "LabGym/detectron2/data/common.py",
            "import random\n\n\nclass Pool:\n    def __init__(self):\n        self._rng = random.Random(0)\n"
            "        self._fallback_candidates = {3, 1, 2}\n\n    def draw(self):\n"
            "        return self._rng.sample(self._fallback_candidates, k=1)[0]\n",
        )
        wheel.writestr("LabGym/detectron2/layers/__init__.py", "# from LabGym.detectron2 import layers\n")
        wheel.writestr(
            "LabGym/detectron2/layers/deform_conv.py",
            "try:\n    from LabGym.detectron2 import _C\nexcept ImportError:\n"
            '    _msg = "detectron2 is not compiled successfully, please build following the instructions!"\n',
        )
        wheel.writestr("LabGym/detectron2/model_zoo/configs/Base.yaml", "A: LabGym.detectron2\n")
    return path


def test_only_detectron2_is_extracted_and_its_names_are_restored(tool, source):
    files = tool.detectron2_files(source)
    assert all(name.startswith("detectron2/") for name in files)
    assert not any(b"LabGym.detectron2" in data for name, data in files.items() if name.endswith(".py"))
    assert files["detectron2/model_zoo/configs/Base.yaml"] == b"A: LabGym.detectron2\n"


def test_wheel_can_be_installed_and_imported(tool, source, tmp_path):
    wheel = tool.build_wheel(tool.detectron2_files(source), tmp_path)
    with zipfile.ZipFile(wheel) as content:
        info = f"detectron2-{tool.VERSION}.dist-info"
        for line in content.read(f"{info}/RECORD").decode().splitlines():
            name, digest, size = line.rsplit(",", 2)
            if name.endswith("RECORD"):
                continue
            data = content.read(name)
            assert int(size) == len(data)
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert "Apache License" in content.read(f"{info}/licenses/LICENSE").decode()
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    show = subprocess.run([*pip, "list", "--path", str(site)], check=True, capture_output=True, text=True).stdout
    assert f"detectron2 {tool.VERSION}" in " ".join(show.split())
    code = "from detectron2.data.common import Pool; print(Pool().draw())"
    drawn = subprocess.run([sys.executable, "-c", code], cwd=site, check=True, capture_output=True, text=True).stdout
    assert int(drawn) == random.Random(0).sample([1, 2, 3], k=1)[0]


def test_unexpected_source_raises(tool, tmp_path):
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("LabGym/detectron2/data/common.py", "")
        wheel.writestr("LabGym/detectron2/layers/deform_conv.py", "")
        wheel.writestr("LabGym/detectron2/layers/__init__.py", "")
    with pytest.raises(tool.InstallError, match="expected 1"):
        tool.detectron2_files(path)


def test_download_with_another_hash_raises(tool, tmp_path, monkeypatch):
    (tmp_path / tool.SOURCE_WHEEL).write_bytes(b"not the wheel")
    monkeypatch.setattr(tool.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", ""))
    with pytest.raises(tool.InstallError, match="SHA-256 .*a2900cff"):
        tool.download_source(tmp_path)


def test_an_installed_detectron2_is_kept(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "download_source", None)
    assert tool.main() == 0 and "detectron2" in capsys.readouterr().out


def test_a_broken_detectron2_is_not_replaced(tmp_path):
    (tmp_path / "detectron2.py").write_text("import a_module_that_is_not_there\n")
    run = subprocess.run(
        [sys.executable, str(TOOL)], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path), "PATH": ""}
    )
    assert run.returncode == 1
    assert "a_module_that_is_not_there" in run.stderr and "Traceback" not in run.stderr


def test_uncompiled_operators_raise():
    torch = pytest.importorskip("torch")
    layers = pytest.importorskip("detectron2.layers")
    if importlib.util.find_spec("detectron2._C"):
        pytest.skip("this detectron2 is compiled")
    if not importlib.util.find_spec("detectron2.layers._uncompiled_ops"):
        pytest.skip("this detectron2 was not installed by tools/install_detectron2.py")
    with pytest.raises(RuntimeError, match="no compiled operators"):
        layers.nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)
    with pytest.raises(RuntimeError, match="no compiled operators"):
        layers.ROIAlignRotated((2, 2), 1.0, 0)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 6))
    with pytest.raises(ImportError, match="no compiled operators"):
        layers.DeformConv(1, 1, 1)
