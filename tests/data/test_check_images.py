"""The check ahead of time finds every file that training would leave out."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from halodet.data import validate_coco, write_shapes
from halodet.data.check_images import check_images
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.engine import load_config
from halodet.errors import ImageError
from halodet.inference import read_image

import pytest
from detectron2.data.datasets import load_coco_json
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "check_dataset.py"
BAD_IMAGES = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bad_inputs" / "images"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_dataset_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shapes(tmp_path):
    """(json, folder, file names) of 6 scenes."""
    json_file, folder = write_shapes(tmp_path / "shapes", "train", 6), tmp_path / "shapes" / "train"
    return json_file, folder, [image["file_name"] for image in json.loads(json_file.read_text())["images"]]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_breaks_off_after_its_header_is_found(shapes, processes):
    json_file, folder, names = shapes
    cut(folder / names[1])
    cut(folder / names[4])
    checked = validate_coco(json_file, folder)
    assert checked.faults == []  # its header is whole
    faults = check_images(checked, folder, processes=processes)
    assert [fault.where for fault in faults] == ["image 1", "image 4"]
    assert all(
        str(folder / name) in str(fault) and "truncated" in fault.what
        for fault, name in zip(faults, names[1::3], strict=True)
    )


def test_a_file_that_changed_size_since_the_json_was_checked_is_found(shapes):
    json_file, folder, names = shapes
    checked = validate_coco(json_file, folder)
    Image.new("RGB", (7, 5)).save(folder / names[2])
    (fault,) = check_images(checked, folder, processes=1)
    assert fault.where == "image 2" and "is 7 x 5 pixels" in fault.what


def test_the_tool_reports_all_bad_files_in_lines_and_json(shapes, tool, tmp_path, capsys):
    json_file, folder, names = shapes
    arguments = ["--json", str(json_file), "--images", str(folder), "--processes", "1"]
    report = tmp_path / "report.json"
    assert tool.main([*arguments, "--report", str(report)]) == 0
    assert json.loads(report.read_text()) == {"images_usable": 6, "faults": []}
    captured = capsys.readouterr()
    assert "6 images" in captured.out and "6/6" in captured.err, "no progress was shown"

    cut(folder / names[0])
    (folder / names[5]).unlink()
    assert tool.main([*arguments, "--report", str(report)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3
        and names[5] in lines[0]
        and names[0] in lines[1]
        and "4 images" in lines[2]
        and "2 faults" in lines[2]
    )
    found = json.loads(report.read_text())
    assert found["images_usable"] == 4 and [fault["where"] for fault in found["faults"]] == ["image 5", "image 0"]

    assert tool.main([*arguments, "--no-images"]) == 1
    assert names[0] not in capsys.readouterr().out


def test_nothing_readable_is_unusable(shapes, tool, capsys):
    json_file, folder, names = shapes
    for name in names:
        cut(folder / name)
    assert tool.main(["--json", str(json_file), "--images", str(folder), "--processes", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "none of its 6 images can be read (first image 0: " in captured.err.splitlines()[-1]


def test_wrong_arguments_are_one_sentence(shapes, tool, tmp_path, capsys):
    arguments = ["--json", str(shapes[0]), "--images", str(shapes[1]), "--processes"]
    with pytest.raises(SystemExit, match="2"):
        tool.main([*arguments, "0"])
    assert "--processes is 0, expected 1 or more" in capsys.readouterr().err
    assert tool.main([*arguments, "1", "--report", str(tmp_path / "none" / "report.json")]) == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err.splitlines()[-1]


def test_it_names_the_images_that_training_leaves_out(shapes, tool, tmp_path):
    """Of the json as Detectron2 reads it, image by image: a file that breaks off, one and all annotations broken, only a crowd, nothing."""
    json_file, folder, names = shapes
    data = json.loads(json_file.read_text())
    box = {"category_id": 1, "iscrowd": 0, "bbox": [1, 1, 9, 9], "area": 81, "segmentation": [[1, 1, 10, 1, 10, 10]]}
    whole = [{**box, "image_id": n, "id": 100 + n} for n in (0, 1, 2)]
    broken = [{**box, "image_id": n, "id": 200 + n, "bbox": [5, 5, 0, 3]} for n in (1, 3)]
    crowds = [{**box, "image_id": n, "id": 300 + n, "iscrowd": 1} for n in (3, 4)]
    data["annotations"] = whole + broken + crowds
    cut(folder / names[2])
    odd, report = tmp_path / "odd.json", tmp_path / "report.json"
    odd.write_text(json.dumps(data))
    assert tool.main(["--json", str(odd), "--images", str(folder), "--processes", "1", "--report", str(report)]) == 1
    found = json.loads(report.read_text())
    told = {fault["where"] for fault in found["faults"] if fault["action"] == "left out in training"}
    assert told == {"image 2", "image 3"} and found["images_usable"] == 4

    cfg = load_config("quick/mask_rcnn_halo_shapes")
    mapper = RobustDatasetMapper(cfg, is_train=True, patience=100)
    entries = load_coco_json(str(odd), str(folder), "test_left_out")
    assert {f"image {entry['image_id']}" for entry in entries if mapper(entry) is None} == told
    kept = validate_coco(odd, folder, require_annotations=True).dataset
    assert [image["id"] for image in kept["images"]] == [0, 1, 2, 4, 5] and {
        a["image_id"] for a in kept["annotations"]
    } == {0, 1, 2, 4}


def test_a_report_that_cannot_be_written_is_told_before_images_are_read(shapes, tool, tmp_path, capsys):
    assert (
        tool.main(
            ["--json", str(shapes[0]), "--images", str(shapes[1]), "--report", str(tmp_path / "none" / "report.json")]
        )
        == 2
    )
    assert "reading images" not in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_found(tmp_path):
    """The whole group of processes gets the signal, as from a terminal, when the first of many images have been read."""
    json_file, folder = write_shapes(tmp_path / "shapes", "train", 4), tmp_path / "shapes" / "train"
    data = json.loads(json_file.read_text())
    cut(folder / data["images"][0]["file_name"])
    data["images"] += [{**data["images"][1], "id": number} for number in range(1000, 61000)]
    many, report = tmp_path / "many.json", tmp_path / "report.json"
    many.write_text(json.dumps(data))
    command = [sys.executable, TOOL, "--json", many, "--images", folder, "--processes", "2", "--report", report]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    shown = b""
    while not re.search(rb"reading images[^\r]* [1-9]\d*/60004", shown):
        shown += os.read(process.stderr.fileno(), 4096)
    os.killpg(process.pid, signal.SIGINT)
    out, rest = (text.decode() for text in process.communicate(timeout=60))
    assert process.returncode == 130 and "Traceback" not in rest, f"{process.returncode}\n{out}\n{rest}"
    first, last = out.splitlines()
    assert "truncated" in first and re.search(r"stopped after [1-9]\d* of 60004 images, 1 faults so far", last)
    found = json.loads(report.read_text())
    assert found["images_usable"] is None and [fault["where"] for fault in found["faults"]] == ["image 0"]


@pytest.mark.skipif(
    not BAD_IMAGES.is_dir(), reason=f"no folder {BAD_IMAGES}; set DETECTRON2_DATASETS to one with bad_inputs"
)
def test_of_real_odd_files_exactly_the_unreadable_ones_are_found(tmp_path):
    images, bad = [], []
    for number, path in enumerate(
        path for path in sorted(BAD_IMAGES.rglob("*")) if path.is_file() and path.suffix != ".json"
    ):
        try:
            height, width = read_image(path).shape[:2]
        except ImageError:
            bad.append(number)
            try:
                with Image.open(path) as image:
                    width, height = image.size
            except Exception:
                width, height = 1, 1
        images.append({"id": number, "file_name": str(path.relative_to(BAD_IMAGES)), "width": width, "height": height})
    json_file = tmp_path / "a.json"
    json_file.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}))
    checked = validate_coco(json_file, BAD_IMAGES)
    faults = [
        fault
        for fault in (*checked.faults, *check_images(checked, BAD_IMAGES, processes=2))
        if fault.where.startswith("image ")
    ]
    assert sorted(int(fault.where.split()[1]) for fault in faults) == bad
