"""README.md and docs/: code blocks run, files and configs that they name exist, the variant table is current."""

import re
from fractions import Fraction

from halodet.config import config_dir, load_config
from halodet.data.synthetic_shapes import shape_scene
from halodet.inference import VideoWriter
from halodet.mixers import MIXERS
from halodet.models import VARIANTS

import exported_models
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import ROOT
from PIL import Image
from pycocotools.coco import COCO

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "datasets/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
CODE = [name for name, text in TEXTS.items() if "```python" in text]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder with what the pages about inference name; the detector has random weights that find objects."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        Image.fromarray(shape_scene("val", len(name)).image.round().astype(np.uint8)).save(folder / name)
    with VideoWriter(folder / "clip.mp4", Fraction(5), Fraction(1, 5)) as video:
        for frame in range(3):
            video.write(np.ascontiguousarray(shape_scene("val", 0).image.round().astype(np.uint8)), frame)
    output = folder / "output/demo"
    output.mkdir(parents=True)
    cfg = load_config("quick/mask_rcnn_halo_shapes.yaml", ["MODEL.DEVICE", "cpu"], train=False)
    (output / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    DetectionCheckpointer(model, str(output)).save("model_final")
    classes = [{"id": 3, "name": "square"}, {"id": 5, "name": "star"}]
    exported_models.write_onnx(folder / "model.onnx", exported_models.metadata(classes=classes))
    return folder


@pytest.mark.parametrize("name", CODE)
def test_python_blocks_run(name, demo_folder, monkeypatch):
    variables: dict = {}
    monkeypatch.chdir(demo_folder)
    mixers = set(MIXERS)
    for code in re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL):
        exec(code, variables)  # noqa: S102
    for added in set(MIXERS) - mixers:
        del MIXERS[added]
    if "model" in variables:
        assert sum(p.numel() for p in variables["model"].parameters()) > 10e6
    if "result" in variables:
        assert len(variables["predictor"]("photo.jpg")) > 0 and (demo_folder / "drawing.jpg").stat().st_size > 1000
    if "annotations" in variables:
        assert variables["frame"].index == 2 and variables["result"].track_ids is not None
        assert len(variables["annotations"]) == len(variables["detections"]) == 2
        assert len(COCO("photo.json").anns) == 2
    if "out" in variables:
        assert variables["out"].shape == (1, 8, 64, 50, 67)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name):
    page = ROOT / name
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXTS[name]):
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("name", TEXTS)
def test_commands_name_existing_configs_tools_flags_and_targets(name):
    text = TEXTS[name]
    for config in re.findall(r"(?:--config-file |`)(?:configs/)?((?:mask|cascade|faster|retinanet|quick)[\w/]+)", text):
        assert (
            config in ("quick/", "mask_rcnn_r101_se_halo_") or (config_dir() / config).with_suffix(".yaml").is_file()
        ), config
    for tool in re.findall(r"(?<!tests/)tools/(\w+)\.py", text):
        assert (ROOT / f"tools/{tool}.py").is_file(), tool
    for path in re.findall(r"`((?:halodet|docs|tests|configs)/[\w/.-]+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    sources = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tools/*.py"))
    sources += "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("halodet/*/**/*.py"))
    for flag in re.findall(r"tools/(?!timm_train)[^\n]*? (--[a-z][\w-]+)", text):
        known = ("--config-file", "--resume", "--eval-only", "--num-gpus")  # Detectron2's
        assert flag in known or f'"{flag}"' in sources, flag
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets


def test_variant_table_is_current():
    from halodet.models import HaloNet

    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\|[^|]*\| ([\d.]+) \| [\d.]+ \|", TEXTS["docs/models.md"], re.MULTILINE)
    assert [name for name, _ in rows] == list(VARIANTS)
    for name, parameters in rows:
        with torch.device("meta"):
            assert f"{sum(p.numel() for p in HaloNet(name).parameters()) / 1e6:.2f}" == parameters, name


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_every_page_is_in_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation
