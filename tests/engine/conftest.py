"""Short runs on drawn shapes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for small_run, which scripts of other processes import too


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def shapes(shapes_folder, monkeypatch, one_thread):
    """Runs look for datasets/shapes in a folder of the tests', where it is drawn once."""
    monkeypatch.chdir(shapes_folder)
    return shapes_folder
