"""Comparisons whose runs a fake tools/train_net.py trains: plan, statistics, failures, interruption and repetition."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from halodet.benchmark.chart import Bar, draw_bars
from halodet.benchmark.comparison.main import main
from halodet.benchmark.comparison.plan import Run, config_names, folder_name
from halodet.benchmark.comparison.results import Result
from halodet.benchmark.comparison.summary import Spread, spread, summarize
from halodet.benchmark.comparison.training import last_error, lock_folder
from halodet.errors import ConfigError

import pytest
from helpers import fork
from PIL import Image

FAKE = Path(__file__).with_name("fake_train_net.py")
CONV = ["MODEL.HALONET.MIXERS", "['conv','conv','conv','conv']"]
VARIANTS = ["--variant", "a", *CONV, "--variant", "b", *CONV]


def arguments(output, *flags, seeds=(1, 2), opts=("SOLVER.MAX_ITER", "4")):
    config = ["--config-file", "quick/mask_rcnn_halo_shapes"]
    return [*config, "--seeds", *map(str, seeds), *flags, "--output", str(output), *opts]


def compare(output, *flags, **keywords):
    return main(arguments(output, *flags, **keywords), "", FAKE)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def starts(output):
    """Return the arguments of each start of the fake tools/train_net.py."""
    return [line for path in sorted(output.rglob("starts.txt")) for line in path.read_text().splitlines()]


def message(capsys, code, expected=2):
    assert code == expected
    return capsys.readouterr().err


def test_means_and_standard_deviations(tmp_path, capsys):
    flags = [*VARIANTS, "--vary", "SOLVER.BASE_LR", "0.1", "0.2"]
    assert compare(tmp_path, *flags, seeds=(1, 2, 3)) == 0
    rows = {(row["name"], row["SOLVER.BASE_LR"]): row for row in read_csv(tmp_path / "summary.csv")}
    assert list(rows) == [("a", "0.1"), ("a", "0.2"), ("b", "0.1"), ("b", "0.2")]
    row = rows["a", "0.1"]  # of 10, 12 and 17: mean 13, squared deviations 9 + 1 + 16 = 26, divided by 2
    assert float(row["box_ap_mean"]) == pytest.approx(13) and float(row["box_ap_sd"]) == pytest.approx(13**0.5)
    assert float(row["mask_ap_mean"]) == pytest.approx(3.25)
    assert float(row["seconds_per_iter"]) == pytest.approx((9 + 2.5) / 2), "the median of the runs' medians"
    assert float(row["memory_mib"]) == 103 and row["finished"] == row["runs"] == "3"
    assert {key for key, row in rows.items() if row["best"] == "1"} == {("a", "0.2"), ("b", "0.2")}
    printed = capsys.readouterr().out
    assert "13.00 ± 3.61" in printed and "0.2 (best)" in printed and "0.1 (best)" not in printed
    assert (tmp_path / "table.md").read_text().strip() in printed
    with Image.open(tmp_path / "comparison.png") as chart:
        assert chart.width > chart.height > 100


def test_one_run_has_no_deviation():
    assert spread([4.0, None]) == Spread(4.0, None) and str(spread([4.0])) == "4.00"
    assert spread([None]) is None


def test_a_value_with_which_a_seed_failed_is_not_the_best():
    def result(value, seed, ap):
        run = Run("a", value, seed, Path("a"), Path("a.yaml"), (), {}, 4)
        return Result(run, ap) if ap else Result(run, reason="diverged")

    results = [result("0.1", 1, 30.0), result("0.1", 2, 30.2), result("0.4", 1, 30.3), result("0.4", 2, None)]
    assert [row.best for row in summarize(results, [None, None])] == [True, False]
    assert [row.best for row in summarize(results[2:], [None])] == [True], "where all values have failures"


def test_rows_without_a_value_are_in_the_chart(tmp_path):
    names = ["failed", "also failed", "nan", "zero"]
    bars = [
        Bar(name, name, ap, sd)
        for name, ap, sd in zip(names, (None, None, math.nan, 0.0), (None, None, None, 0.0), strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit
        draw_bars({"box AP": bars}, "", tmp_path / "chart.svg", "percent")
    text = (tmp_path / "chart.svg").read_text()
    assert text.count("<!--  no value -->") == 3 and all(f"<!-- {name} -->" in text for name in names)


def test_each_run_gets_its_options_and_folder(tmp_path):
    assert compare(tmp_path, *VARIANTS, "--vary", "SOLVER.BASE_LR", "0.1", "--num-gpus", "1") == 0
    runs = read_csv(tmp_path / "runs.csv")
    assert [(run["name"], run["seed"]) for run in runs] == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert [run["folder"] for run in runs] == [
        str(tmp_path / name / "0.1" / f"seed{seed}") for name in "ab" for seed in (1, 2)
    ]
    assert [float(run["box_ap"]) for run in runs] == [10, 12, 10, 12]
    first = starts(tmp_path)[0]
    assert "--resume --num-gpus 1" in first
    order = ["SOLVER.MAX_ITER 4", "MODEL.HALONET.MIXERS", "SOLVER.BASE_LR 0.1", "SEED 1", "OUTPUT_DIR"]
    assert sorted(order, key=first.index) == order, "later options override earlier ones"


def test_finished_runs_are_not_repeated(tmp_path, capsys):
    assert compare(tmp_path, *VARIANTS) == 0
    table = (tmp_path / "table.md").read_text()
    assert compare(tmp_path, *VARIANTS) == 0 and len(starts(tmp_path)) == 4
    assert "4 run(s), 4 finished before" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == table
    assert compare(tmp_path, *VARIANTS, seeds=(1, 2, 3)) == 0 and len(starts(tmp_path)) == 6


def test_a_run_without_an_evaluation_of_the_last_iteration_is_continued(tmp_path):
    assert compare(tmp_path, seeds=(1,)) == 0
    metrics = next(tmp_path.rglob("metrics.json"))
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert compare(tmp_path, seeds=(1,)) == 0 and len(starts(tmp_path)) == 2


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (["SOLVER.MAX_ITER", "5"], "SOLVER.MAX_ITER: 4 -> 5"),
        (["SOLVER.MAX_ITER", "4", "MODEL.HALONET.MIXER_OPTIONS.botnet.window", "8"], "botnet.window: None -> 8"),
        (["SOLVER.MAX_ITER", "4", "DATALOADER.NUM_WORKERS", "1"], "DATALOADER.NUM_WORKERS: 0 -> 1"),
    ],
)
def test_changed_options_are_refused(tmp_path, capsys, opts, named):
    assert compare(tmp_path, seeds=(1,)) == 0
    text = message(capsys, compare(tmp_path, seeds=(1,), opts=opts))
    assert named in text and "another --output" in text and len(starts(tmp_path)) == 1


def test_changed_data_are_refused(tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text("{}")
    flags = [
        f"--{split}-{kind}={path}" for split in ("train", "val") for kind, path in (("json", data), ("images", "."))
    ]
    assert compare(tmp_path / "out", *flags, seeds=(1,)) == 0
    data.write_text('{"images": []}')
    text = message(capsys, compare(tmp_path / "out", *flags, seeds=(1,)))
    assert "--train-json" in text and "sha256" in text


def test_a_record_of_an_older_version_counts_with_the_defaults_of_new_keys(tmp_path, capsys):
    assert compare(tmp_path, seeds=(1,)) == 0
    record = next(tmp_path.rglob("compare.json"))
    settings = json.loads(record.read_text())
    del settings["SOLVER.GRAD_ACCUM_STEPS"]
    record.write_text(json.dumps(settings))
    assert compare(tmp_path, seeds=(1,)) == 0
    record.unlink()
    assert "compare.json" in message(capsys, compare(tmp_path, seeds=(1,)))


def test_failed_runs_do_not_stop_the_others(tmp_path, capsys):
    flags = [word for name in ("bad", "killed", "silent", "a") for word in ("--variant", name, *CONV)]
    assert compare(tmp_path, *flags, seeds=(1,)) == 1
    runs = {run["name"]: run for run in read_csv(tmp_path / "runs.csv")}
    assert {name: run["status"] for name, run in runs.items()} == {
        "bad": "failed", "killed": "failed", "silent": "failed", "a": "finished",
    }  # fmt: skip
    assert runs["bad"]["reason"] == "no such mixer" and "SIGKILL" in runs["killed"]["reason"]
    assert "bbox/AP of iteration 4" in runs["silent"]["reason"] and runs["bad"]["box_ap"] == ""
    assert "no such mixer" in Path(runs["bad"]["log"]).read_text()
    table = (tmp_path / "table.md").read_text()
    assert "no such mixer" in table and runs["bad"]["log"] in table and "0 of 1" in table
    assert (tmp_path / "comparison.png").is_file()
    capsys.readouterr()
    # A run that failed before it trained may be repeated with other options.
    assert compare(tmp_path, "--variant", "bad", *CONV[:1], "['conv','conv','conv','halo']", seeds=(1,)) == 1
    assert len((tmp_path / "bad/seed1/starts.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\n\nW1129 a warning\n", "CUDA out of memory"),
        ("AssertionError\n", "AssertionError"),
        ("nothing known\n", "nothing known"),
        ("", ""),
    ],
)
def test_the_last_error_of_a_log(text, expected):
    assert last_error(text).endswith(expected)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


@pytest.mark.distributed
def test_an_interrupted_comparison_continues(tmp_path, capsys):
    output, printed = tmp_path / "out", tmp_path / "printed.txt"
    flags = ["--variant", "hangs", *CONV, "--variant", "a", *CONV]
    process = fork(main, arguments(output, *flags, seeds=(1,)), "", FAKE, printed=printed)
    wait_for(output / "hangs/seed1/pid")
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130 and "Run the same command again" in printed.read_text()
    assert (output / "hangs/seed1/last_checkpoint").exists() and not (output / "a").exists()
    assert compare(output, *flags, seeds=(1,)) == 0
    assert "2 run(s), 0 finished" in capsys.readouterr().out and len(starts(output)) == 3
    hangs, _ = read_csv(output / "runs.csv")
    assert float(hangs["memory_mib"]) == 101, "what the resumed run repeats replaces what it had"


@pytest.mark.distributed
def test_a_second_interruption_kills_the_run(tmp_path):
    output, printed = tmp_path / "out", tmp_path / "printed.txt"
    flags = ["--variant", "stubborn", *CONV]
    process = fork(main, arguments(output, *flags, seeds=(1,)), "", FAKE, printed=printed)
    pid = wait_for(output / "stubborn/seed1/pid")
    os.kill(process.pid, signal.SIGINT)
    while "Ctrl-C again" not in printed.read_text():
        time.sleep(0.02)
    assert compare(output, *flags, seeds=(1,)) == 2, "the folder is in use"
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_run_that_outlives_its_comparison_keeps_the_folder_locked(tmp_path):
    lock = lock_folder(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock]) as run:
        os.close(lock)
        with pytest.raises(ConfigError, match="in use"):
            lock_folder(tmp_path)
        run.communicate(b"\n")
    os.close(lock_folder(tmp_path))


def test_configs_of_one_name_are_distinguished(tmp_path):
    paths = [tmp_path / name for name in ("one/x.yaml", "two/x.yaml", "two/y.yaml", "three/one/z.yaml")]
    assert config_names(paths) == ["one-x", "two-x", "y", "z"]
    with pytest.raises(ConfigError, match="x.yaml"):
        config_names([paths[0], paths[0]])


def test_names_of_several_configs_with_variants(tmp_path):
    configs = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        configs.append(tmp_path / folder / "x.yaml")
        configs[-1].write_text("DATASETS: {TEST: ['halodet_shapes_val']}\n")
    command = ["--config-file", *map(str, configs), "--seeds", "1", *VARIANTS, "--output", str(tmp_path / "out")]
    assert main([*command, "SOLVER.MAX_ITER", "4"], "", FAKE) == 0
    names = [run["name"] for run in read_csv(tmp_path / "out/runs.csv")]
    assert names == ["one-x-a", "one-x-b", "two-x-a", "two-x-b"]


def test_folder_names_of_values_differ():
    values = ["0.003", "['conv','elsa']", "['conv','elsa', ]", "(1, 2)", "[1, 2]", "", "..", "a/b", "x" * 100]
    names = [folder_name(value) for value in values]
    assert names[0] == "0.003" and len(set(names)) == len(names)
    assert all(name and "/" not in name and name != ".." and len(name) < 60 for name in names)


@pytest.mark.parametrize(
    ("flags", "opts", "named"),
    [
        (["--variant", "a", "SOLVER.BASE_LR"], [], "got 1 words"),
        (["--variant", "a/b", *CONV], [], "--variant a/b"),
        (["--variant", "a", *CONV, "--variant", "a", *CONV], [], "different names"),
        (["--variant", "a", "SEED", "3"], [], "--seeds"),
        (["--vary", "SOLVER.BASE_LR"], [], "--vary SOLVER.BASE_LR"),
        (["--vary", "SOLVER.BASE_LR", "0.1", "0.1"], [], "different values"),
        (["--vary", "SOLVER.BASE_LR", "0.1", "SOLVER.MAX_ITER", "4"], [], "after --output"),
        (["--vary", "SOLVER.BASE_LR", "0.1"], ["SOLVER.BASE_LR", "0.2"], "the overrides"),
        (["--seeds", "1", "SOLVER.MAX_ITER", "4"], [], "after --output"),
        (["--seeds", "1", "1"], [], "different seeds"),
        (["--train-json", "x.json"], [], "--val-json"),
        ([], ["OUTPUT_DIR", "x"], "--output"),
        (["--num-gpus", "64"], [], "--num-gpus=64"),
    ],
)
def test_invalid_arguments(tmp_path, capsys, flags, opts, named):
    with pytest.raises(SystemExit) as stop:
        compare(tmp_path, *flags, opts=opts)
    assert named in message(capsys, stop.value.code) and not starts(tmp_path)


@pytest.mark.parametrize(
    ("opts", "named"),
    [(["SOLVER.NO_KEY", "1"], "SOLVER.NO_KEY"), (["DATASETS.TEST", "()"], "DATASETS.TEST=()")],
)
def test_an_invalid_config_trains_nothing(tmp_path, capsys, opts, named):
    assert named in message(capsys, compare(tmp_path, opts=opts)) and not starts(tmp_path)


def test_overrides_may_follow_a_double_dash(tmp_path):
    config = ["--config-file", "quick/mask_rcnn_halo_shapes", "--output", str(tmp_path), "--seeds", "1"]
    assert main([*config, "--", "SOLVER.MAX_ITER", "4"], "", FAKE) == 0
    assert "SOLVER.MAX_ITER 4" in starts(tmp_path)[0]
