"""What the README says works, works."""

import re
from pathlib import Path

from halodet.config.defaults import config_dir

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs():
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)  # noqa: S102
    assert sum(p.numel() for p in names["model"].parameters()) > 10e6
    assert names["out"].shape == (1, 8, 64, 50, 67)


def test_files_it_names_are_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"--config-file (?:configs/)?([\w./]+)", README):
        if name.startswith(("mask", "cascade", "quick")):
            assert (config_dir() / name).with_suffix(".yaml").is_file(), name
    for verb in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE) or verb == "demo", verb


def test_the_variant_table_is_that_of_the_code():
    from halodet.backbones import VARIANTS, HaloNet

    import torch

    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\|[^|]*\| ([\d.]+) \| [\d.]+ \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == list(VARIANTS)
    for name, parameters in rows:
        with torch.device("meta"):
            assert f"{sum(p.numel() for p in HaloNet(name).parameters()) / 1e6:.2f}" == parameters, name
