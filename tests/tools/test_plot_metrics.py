"""Plots of metrics.json as runs write it, and as killed and resumed runs leave it."""

import json
import re

from halodet.benchmark.chart import draw_curves
from halodet.errors import HalodetError

import pytest
from detectron2.utils.events import EventStorage, JSONWriter
from helpers import load_tool
from PIL import Image

tool = load_tool("plot_metrics")
read_metrics = tool.read_metrics


def write(folder, values, start=0):
    """Write the metrics.json of a run that has the AP ``values`` at iterations start + 9, start + 19, ..."""
    folder.mkdir(exist_ok=True)
    writer = JSONWriter(str(folder / "metrics.json"), window_size=1)
    with EventStorage(start) as storage:
        for step in range(10 * len(values)):
            storage.iter = start + step
            storage.put_scalar("total_loss", 4.0 + values[0] - 0.01 * (start + step))
            if step % 10 == 9:
                storage.put_scalars(
                    **{"bbox/AP": values[step // 10], "segm/AP": values[step // 10] / 2}, smoothing_hint=False
                )
            if step % 5 == 4:
                writer.write()
    writer.close()
    return folder


def run(capsys, *arguments):
    """Run the tool; returns its exit code, standard output and standard error."""
    try:
        code = tool.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_detectron2s_own_file_is_read(tmp_path):
    metrics = read_metrics(write(tmp_path / "run", [1.0, 7.0, 3.0]))
    assert metrics["bbox/AP"] == {9: 1.0, 19: 7.0, 29: 3.0}
    assert list(metrics["total_loss"]) == [4, 9, 14, 19, 24, 29]


def test_an_incomplete_line_is_ignored_up_to_what_a_resumed_run_appended(tmp_path):
    folder = write(tmp_path / "run", [1.0, 2.0, 3.0])
    path = folder / "metrics.json"
    whole = path.read_text().rstrip()
    path.write_text(whole[:-15])
    assert read_metrics(folder)["bbox/AP"] == {9: 1.0, 19: 2.0}
    write(folder, [8.0, 9.0], start=20)
    first, *_ = [line for line in path.read_text().splitlines() if line.count("{") == 2]
    assert json.loads(first[first.rfind("{") :])["iteration"] == 24, "the resumed run appends to the incomplete line"
    losses = read_metrics(folder)["total_loss"]
    assert list(losses) == [4, 9, 14, 19, 24, 29, 34, 39]
    assert losses[19] == pytest.approx(5 - 0.19) and losses[24] == pytest.approx(12 - 0.24), (
        "iteration 24 is the resumed run's"
    )


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    folder = write(tmp_path / "run", [1.0, 2.0, 3.0, 4.0])
    write(folder, [8.0], start=10)
    metrics = read_metrics(folder)
    assert metrics["bbox/AP"] == {9: 1.0, 19: 8.0}, "iterations 29 and 39 were dropped"
    assert list(metrics["total_loss"]) == [4, 9, 14, 19]


def test_a_file_without_metrics(tmp_path):
    with pytest.raises(HalodetError, match="metrics.json"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(
        '[1, 2]\n7\n{"iteration": 3}\n{"loss": 3.0}\nhello\n\n{"iteration": null, "a": 3}\n'
    )
    with pytest.raises(HalodetError, match="metrics.json.* 7 lines"):
        read_metrics(tmp_path)


def test_last_and_best_of_each_run_are_printed(tmp_path, capsys):
    a, b = write(tmp_path / "a", [1.0, 7.0, float("nan"), 3.0]), write(tmp_path / "b=c", [float("nan")])
    picture = tmp_path / "new" / "ap.png"
    code, out, _ = run(capsys, "--runs", f"A={a}", f"B={b}", "--metric", "bbox/AP", "total_loss", "--output", picture)
    assert code == 0
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    assert cells[0] == ["bbox/AP", "A", "4", "3 at 39", "7 at 19"]
    assert cells[1] == ["bbox/AP", "B", "1", "nan at 9", ""]
    assert cells[2] == ["total_loss", "A", "8", "4.61 at 39", "4.61 at 39"]
    with Image.open(picture) as image:
        assert image.width > 1.5 * image.height, "two panels beside each other"


def test_a_fourth_panel_starts_another_row(tmp_path):
    sizes = []
    for panels in (1, 3, 4):
        draw_curves({f"metric {i}": {"A": {0: 1.0, 9: 2.0}} for i in range(panels)}, "", tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as image:
            sizes.append(image.size)
    (width, height), three, four = sizes
    assert three == (3 * width, height) and four == (3 * width, 2 * height)


def test_the_curves_are_those_of_the_runs(tmp_path):
    """The lines that matplotlib is given, in an SVG: one for each run and metric, each run in one color."""
    runs = [
        f"{name}={write(tmp_path / name, values)}"
        for name, values in (("rising", [1.0, 2.0, 9.0]), ("falling", [9.0, 2.0, 1.0]))
    ]
    assert tool.main(["--runs", *runs, "--metric", "bbox/AP", "segm/AP", "--output", str(tmp_path / "ap.svg")]) == 0
    paths = re.findall(
        r'<path d="(M [^"]*)" clip-path="[^"]*" style="fill: none; stroke: (#\w+)', (tmp_path / "ap.svg").read_text()
    )
    curves = [
        ([float(n) for n in re.findall(r"-?[\d.]+ (-?[\d.]+)", d)], color) for d, color in paths if d.count("L") == 2
    ]
    assert len(curves) == 4
    assert [color for _, color in curves[:2]] == [color for _, color in curves[2:]] and curves[0][1] != curves[1][1]
    for heights, _ in curves[::2]:
        assert heights == sorted(heights, reverse=True)  # SVG counts from the top
    for heights, _ in curves[1::2]:
        assert heights == sorted(heights)


def strokes(file):
    """(heights, color, dashed) of each curve of at least two points in an SVG."""
    found = re.findall(r'<path d="(M [^"]*)" clip-path="[^"]*" style="fill: none; ([^"]*)"', file.read_text())
    curves = [
        ([float(y) for y in re.findall(r"-?[\d.]+ (-?[\d.]+)", d)], style)
        for d, style in found
        if "#b0b0b0" not in style
    ]
    return [
        (heights, re.search(r"stroke: (#\w+)", style)[1], "dasharray" in style)
        for heights, style in curves
        if len(heights) > 1
    ]


def write_rows(folder, rows):
    folder.mkdir()
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_default_metrics(tmp_path, capsys):
    row = {
        "loss_cls": 1.0,
        "loss_mask": 2.0,
        "total_loss": 3.0,
        "lr": 0.1,
        "time": 1.0,
        "eta_seconds": 7,
        "data_time": 0.1,
    }
    plain = write_rows(tmp_path / "a", [{**row, "iteration": i, "bbox/AP": 10.0 + i, "bbox/APs": 1.0} for i in (0, 9)])
    rows = [
        {**row, "iteration": i, "bbox/AP": 20.0 + i, "ema/bbox/AP": 30.0 + i, "ema/segm/AP": 5.0, "segm/AP": 4.0}
        for i in (0, 9)
    ]
    average = write_rows(tmp_path / "b", rows)
    code, out, _ = run(capsys, "--runs", f"A={plain}", f"B={average}", "--output", tmp_path / "all.svg")
    assert code == 0
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")[:2]) for line in out.splitlines()[2:-1]]
    assert list(dict.fromkeys(metric for metric, _ in cells)) == [
        "total_loss", "lr", "bbox/AP", "segm/AP", "loss_cls", "loss_mask", "ema/bbox/AP", "ema/segm/AP",
    ]  # fmt: skip
    assert ("segm/AP", "A") not in cells and ("segm/AP", "B") in cells and ("ema/bbox/AP", "B") in cells
    curves = strokes(tmp_path / "all.svg")
    dashed = [(heights, color) for heights, color, is_dashed in curves if is_dashed]
    solid = [(heights, color) for heights, color, is_dashed in curves if not is_dashed]
    assert len(dashed) == 2 and len(solid) == 2 * 5 + 1
    (_, color_a), (_, color_b) = solid[:2]
    assert color_a != color_b == dashed[0][1] == dashed[1][1], "a run and its average have one color"
    bbox = next(heights for heights, color in solid[4:] if color == color_b)
    assert dashed[0][0][0] < bbox[0], "30 is above 20, and SVG counts from the top"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_suffix_selects_the_format(tmp_path, capsys, suffix):
    a = write(tmp_path / "a", [1.0])
    assert run(capsys, "--runs", f"A={a}", "--output", tmp_path / f"picture.{suffix}")[0] == 0
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert (tmp_path / f"picture.{suffix}").read_bytes().startswith(begins)


def test_runs_without_any_default_metric(tmp_path, capsys):
    a = write_rows(tmp_path / "a", [{"iteration": 3, "speed": 1.0, "heat": 2.0}])
    code, _, error = run(capsys, "--runs", f"A={a}")
    assert code == 2 and "--metric" in error and "heat, speed" in error


def test_mistakes_are_one_message(tmp_path, capsys):
    a = write(tmp_path / "a", [1.0])
    for arguments, message in (
        (["--runs", "a"], "--runs a is invalid"),
        (["--runs", f"={a}"], "NAME=OUTPUT_DIR"),
        (["--runs", f"A={a}", f"A={a}"], "--runs A, A"),
        (["--runs", f"A={tmp_path / 'gone'}"], "gone/metrics.json"),
        (
            ["--runs", f"A={a}", "--metric", "bbox/AP", "bbox/AP99"],
            "--metric bbox/AP99",
        ),
        (["--runs", f"A={a}", "--output", "ap.bmp"], "ap.bmp"),
        (["--runs", f"A={a}", "--output", a / "metrics.json" / "ap.png"], "--output"),
    ):
        code, _, error = run(capsys, *arguments)
        assert code == 2 and message in error and "Traceback" not in error, error
        assert len([line for line in error.splitlines() if "error: " in line]) == 1


def test_of_two_noisy_runs_each_can_be_seen(tmp_path):
    """Many points are drawn pale, with their running median: the medians of two runs do not cross, though points do."""
    noise = [(7919 * i) % 1000 / 1000 for i in range(1000)]
    panels = {
        "loss": {
            name: {i: base + value for i, value in enumerate(noise)} for name, base in (("low", 0.0), ("high", 0.5))
        }
    }
    draw_curves(panels, "", tmp_path / "noisy.svg")
    found = re.findall(
        r'<path d="(M [^"]*)" clip-path="[^"]*" style="fill: none; stroke: #(?:1f77b4|ff7f0e)([^"]*)"',
        tmp_path.joinpath("noisy.svg").read_text(),
    )
    heights = [
        [float(y) for y in re.findall(r"-?[\d.]+ (-?[\d.]+)", d)] for d, style in found if "opacity" not in style
    ]
    pale = [[float(y) for y in re.findall(r"-?[\d.]+ (-?[\d.]+)", d)] for d, style in found if "opacity" in style]
    low, high = (h for h in heights if len(h) > 100)
    assert len(pale) == 2 and min(low) > max(high), "SVG counts from the top"
    assert max(pale[1]) > min(pale[0]), "the points of the runs overlap"


def test_a_step_in_a_long_curve_stays_one(tmp_path):
    draw_curves({"lr": {"a": {i: 1.0 if i < 500 else 0.1 for i in range(1000)}}}, "", tmp_path / "step.svg")
    paths = re.findall(
        r'<path d="(M [^"]*)" clip-path="[^"]*" style="fill: none; stroke: #1f77b4; stroke-width: 1.5',
        (tmp_path / "step.svg").read_text(),
    )
    assert len({y for d in paths for y in re.findall(r"-?[\d.]+ (-?[\d.]+)", d)}) == 2


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("ema/bbox_TTA/AP50", "percent"),
        ("segm/AP-person", "percent"),
        ("data_time", "seconds"),
        ("memory_mib", "MiB"),
        ("total_loss", ""),
    ],
)
def test_the_units_of_metrics(metric, expected):
    assert tool.unit(metric) == expected
