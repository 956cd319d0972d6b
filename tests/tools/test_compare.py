"""tools/compare.py with real runs: interrupted, continued, repeated; its figures are those of the runs."""

import csv
import os
import re
import signal
import statistics
import time

import pytest
from conftest import TINY
from detectron2.modeling import build_model
from helpers import cached_config, fork, load_tool, read_metrics, run_tool

MIXERS = {name: f"['conv','conv','{name}','conv']" for name in ("elsa", "conv")}


@pytest.fixture
def command(scenes, tmp_path):
    variants = [w for name, mixers in MIXERS.items() for w in ("--variant", name, "MODEL.HALONET.MIXERS", mixers)]
    flags = ["--config-file", "quick/mask_rcnn_halo_shapes", "--seeds", "1", "2", *variants, *scenes]
    return [
        *flags,
        "--vary",
        "SOLVER.BASE_LR",
        "0.003",
        "--output",
        str(tmp_path / "out"),
        *TINY,
        "SOLVER.MAX_ITER",
        "8",
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_comparison_is_interrupted_continued_and_repeated(command, tmp_path, capsys, monkeypatch):
    output, printed = tmp_path / "out", tmp_path / "printed.txt"
    process = fork(run_tool, "compare", command, printed=printed)
    console, deadline = output / "elsa/0.003/seed1/console.txt", time.monotonic() + 120
    while not console.exists() or "Starting training" not in console.read_text():
        assert process.is_alive() and time.monotonic() < deadline, printed.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, printed.read_text()

    tool = load_tool("compare")
    assert tool.main(command) == 0
    starts = re.findall(r"Starting training from iteration (\d+)", console.read_text())
    assert starts[0] == "0" and 0 < int(starts[1]) < 8 and len(starts) == 2
    with (output / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["name"], run["seed"]) for run in runs] == [(n, s) for n in MIXERS for s in ("1", "2")]
    for run in runs:
        metrics = read_metrics(output / run["name"] / "0.003" / f"seed{run['seed']}")
        assert float(run["box_ap"]) == metrics[-1]["bbox/AP"] and float(run["mask_ap"]) == metrics[-1]["segm/AP"]
        assert float(run["memory_mib"]) == max(line["memory_mib"] for line in metrics if "memory_mib" in line)
        times = [line["time"] for line in metrics if "time" in line]
        assert run["seconds_per_iter"] == "" or float(run["seconds_per_iter"]) == statistics.median(times)

    with (output / "summary.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    for name, mixers in MIXERS.items():
        aps = [float(run["box_ap"]) for run in runs if run["name"] == name]
        assert float(rows[name]["box_ap_mean"]) == pytest.approx(sum(aps) / 2)
        assert float(rows[name]["box_ap_sd"]) == pytest.approx(abs(aps[0] - aps[1]) / 2**0.5)
        model = build_model(cached_config("quick/mask_rcnn_halo_shapes", *TINY, "MODEL.HALONET.MIXERS", mixers))
        for column, module in (("parameters", model), ("backbone_parameters", model.backbone.bottom_up)):
            assert int(rows[name][column]) == sum(parameter.numel() for parameter in module.parameters())
        assert int(rows[name]["multiply_adds"]) > int(rows[name]["backbone_multiply_adds"]) > 0
        assert rows[name]["height"] == rows[name]["width"] == "64"

    capsys.readouterr()
    monkeypatch.setattr("halodet.benchmark.comparison.main.count_models", lambda configs, *_: [None] * len(configs))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("seed*/*")}
    assert tool.main(command) == 0 and "4 run(s), 4 finished before" in capsys.readouterr().out
    assert tool.main([*command, "TEST.DETECTIONS_PER_IMAGE", "6"]) == 2
    assert "TEST.DETECTIONS_PER_IMAGE: 5 -> 6" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("seed*/*")}
