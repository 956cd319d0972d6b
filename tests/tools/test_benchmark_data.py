"""The benchmark of data loading as a command."""

import importlib.util
import json
from pathlib import Path

from halodet.data import write_shapes

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

spec = importlib.util.spec_from_file_location(
    "benchmark_data", Path(__file__).parents[2] / "tools" / "benchmark_data.py"
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def dataset(tmp_path):
    json_file = write_shapes(tmp_path / "shapes", "train", 8)
    register_coco_instances("test_benchmark_data", {}, str(json_file), str(tmp_path / "shapes" / "train"))
    yield ["DATASETS.TRAIN", "('test_benchmark_data',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(48,)"]
    DatasetCatalog.remove("test_benchmark_data")
    MetadataCatalog.remove("test_benchmark_data")


def test_prints_medians_and_writes_every_timing(dataset, tmp_path, capsys, one_thread):
    arguments = ["--config-file", "quick/mask_rcnn_halo_shapes", "--rounds", "3", "--batches", "2", "--workers", "0"]
    output = tmp_path / "timings.json"
    opts = [*dataset, "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.FPN.NORM", "SyncBN"]
    assert tool.main([*arguments, "--output", str(output), "--opts", *opts]) == 0
    (figures,) = json.loads(output.read_text())["seconds"].values()
    assert {name: len(seconds) for name, seconds in figures.items()} == {"loader": 3, "step": 3, "waiting": 3}
    assert (
        all(0 < waiting < step for waiting, step in zip(figures["waiting"], figures["step"], strict=True))
        and min(figures["loader"]) > 0
    )
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
    assert row[3] == f"{2 / sorted(figures['step'])[1]:.2f}" and row[4] == f"{sorted(figures['step'])[1]:.2f} s"


def test_an_unusable_config_is_one_sentence(capsys):
    assert tool.main(["--config-file", "gone.yaml"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--rounds", "0"])
