"""Direction of imports between the packages of halodet, and what imports without Detectron2."""

import ast
import sys

import halodet

import pytest
from helpers import ROOT, run_code

# A package imports from packages of a lower level, and from those of its own level; `errors` and `utils` are below all.
LEVELS = {
    "errors": 0,
    "utils": 0,
    "attention": 1,
    "mixers": 2,
    "models": 3,
    "backbones": 4,
    "config": 5,
    "data": 5,
    "checkpoint": 5,
    "solver": 5,
    "evaluation": 5,
    "engine": 6,
    "inference": 6,
    "export": 6,
    "serving": 7,
    "benchmark": 7,
}
# collect_env is a command line that reports on every package
EXEMPT = {"utils/collect_env.py"}


def imports(path):
    """Return the names of modules of halodet that a file imports, also inside functions."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("halodet.")}


def edges():
    """Return (file, package it imports from) of all imports between packages."""
    root = ROOT / "halodet"
    for path in sorted(root.rglob("*.py")):
        file = str(path.relative_to(root))
        own = path.relative_to(root).parts[0].removesuffix(".py")
        for name in imports(path):
            other = name.split(".")[1]
            if own != "__init__" and other != own and file not in EXEMPT and other in LEVELS:
                yield file, own, other


def test_every_package_has_a_level():
    packages = {path.parent.name for path in (ROOT / "halodet").glob("*/__init__.py")}
    assert packages <= set(LEVELS)


def test_imports_point_one_way():
    assert not {(file, other) for file, own, other in edges() if LEVELS[other] > LEVELS[own]}


def test_packages_of_one_level_have_no_cycle():
    graph = {}
    for _, own, other in edges():
        graph.setdefault(own, set()).add(other)

    def visit(package, path):
        assert package not in path, " -> ".join([*path, package])
        for other in sorted(graph.get(package, ())):
            if LEVELS[other] == LEVELS[package]:
                visit(other, [*path, package])

    for package in LEVELS:
        visit(package, [])


BLOCKED = ("detectron2", "cv2", "pycocotools", "fvcore", "iopath")
WITHOUT_DETECTRON2 = f"""
import sys, warnings
warnings.simplefilter("error")
for name in {BLOCKED}:
    sys.modules[name] = None
"""
FORWARD = """
import torch
from halodet import HaloNet, halo_attention, register_mixer, build_mixer
import halodet.attention, halodet.mixers, halodet.models
maps = HaloNet("H0", out_features=["stem", "res4"])(torch.randn(1, 3, 65, 64))
assert maps["res4"].shape == (1, 128, 5, 4)
classifier = HaloNet("R50-SE", norm="FrozenBN", num_classes=3, out_features=["linear"])
assert classifier(torch.randn(1, 3, 64, 64))["linear"].shape == (1, 3)
import halodet
try:
    halodet.Trainer
except ModuleNotFoundError as error:
    assert "detectron2" in str(error) and (sys.version_info < (3, 11) or "collect_env" in error.__notes__[0])
else:
    raise AssertionError("expected an error")
"""
TIMM = """
import timm, torch
import halodet.models.timm_models
assert timm.create_model("halodet_halonet_h0", num_classes=7)(torch.randn(1, 3, 64, 64)).shape == (1, 7)
"""
ATTENTION = """
sys.modules["torchvision"] = sys.modules["timm"] = None
import halodet.attention
import halodet.mixers
assert "torchvision" not in {name for name, module in sys.modules.items() if module is not None}
"""


@pytest.mark.parametrize("code", [FORWARD, ATTENTION], ids=["models", "torch-alone"])
def test_runs_without_detectron2(code, tmp_path):
    result = run_code(WITHOUT_DETECTRON2 + code, tmp_path, ROOT)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_timm_models_need_torch_and_timm_only(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    result = run_code(WITHOUT_DETECTRON2.replace('warnings.simplefilter("error")', "") + TIMM, tmp_path, ROOT)
    assert result.returncode == 0, result.stderr


def test_import_registers_with_detectron2_without_a_warning(tmp_path):
    code = """
import halodet
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.file_io import PathManager
assert "build_halonet_fpn_backbone" in BACKBONE_REGISTRY and "build_halodet_timm_backbone" in BACKBONE_REGISTRY
assert any("shapes" in name for name in DatasetCatalog.list())
assert type(PathManager._PathManager__get_path_handler("timm://x")).__name__ == "TimmHandler"
"""
    result = run_code(code, tmp_path, ROOT)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_broken_dependency_raises_its_own_error(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    result = run_code("import halodet", tmp_path, tmp_path, ROOT)
    assert result.returncode == 1 and "RuntimeError: operator torchvision::nms does not exist" in result.stderr
    assert sys.version_info < (3, 11) or "python -m halodet.utils.collect_env" in result.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
@pytest.mark.parametrize("code", ["import halodet", "import halodet.inference.demo"])
@pytest.mark.parametrize("register", ["0", "1"])
def test_missing_libraries_of_opencv_are_named_with_the_fix(tmp_path, code, register):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    if register == "0":
        code = f"import os; os.environ['HALODET_REGISTER'] = '0'; {code}; import halodet.inference"
    result = run_code(code, tmp_path, tmp_path, ROOT)
    assert result.returncode == 1 and "pip install opencv-python-headless" in result.stderr.splitlines()[-1]


def test_public_names():
    for name in halodet.__all__:
        assert getattr(halodet, name).__name__ == name
    assert set(halodet.__all__) <= set(dir(halodet))
    with pytest.raises(AttributeError, match="no_such_name"):
        halodet.no_such_name  # noqa: B018
