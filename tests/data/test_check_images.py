"""Reading all images of a dataset finds every file that training would skip."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

from halodet.config.load import load_config
from halodet.data import check_images as module
from halodet.data import validate_coco, write_shapes
from halodet.data.annotations import validate_record
from halodet.data.check_images import CheckInterrupted, check_images
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.errors import ImageError
from halodet.utils.image_io import read_image

import pytest
from detectron2.data.datasets import load_coco_json
from helpers import load_tool, truncate
from PIL import Image

BAD_IMAGES = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bad_inputs" / "images"


@pytest.fixture(scope="module")
def tool():
    return load_tool("check_dataset")


@pytest.fixture
def shapes(tmp_path):
    """(json, folder, file names) of 6 scenes."""
    json_file, folder = write_shapes(tmp_path / "shapes", "train", 6), tmp_path / "shapes" / "train"
    return json_file, folder, [image["file_name"] for image in json.loads(json_file.read_text())["images"]]


def test_truncated_file_is_found(shapes):
    json_file, folder, names = shapes
    truncate(folder / names[1])
    truncate(folder / names[4])
    checked = validate_coco(json_file, folder)
    assert checked.issues == []  # its header is intact
    issues = check_images(checked, processes=1)
    assert [issue.where for issue in issues] == ["image 1", "image 4"]
    assert all(
        str(folder / name) in str(issue) and "truncated" in issue.reason
        for issue, name in zip(issues, names[1::3], strict=True)
    )


def test_changed_image_size_is_found(shapes):
    json_file, folder, names = shapes
    checked = validate_coco(json_file, folder)
    Image.new("RGB", (7, 5)).save(folder / names[2])
    (issue,) = check_images(checked, processes=1)
    assert issue.where == "image 2" and "7 x 5 pixels" in issue.reason


def test_the_tool_reports_all_bad_files_in_lines_and_json(shapes, tool, tmp_path, capsys):
    json_file, folder, names = shapes
    arguments = ["--json", str(json_file), "--images", str(folder), "--processes", "1"]
    report = tmp_path / "report.json"
    assert tool.main([*arguments, "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["images_usable"] == 6 and found["issues"] == [] and len(found["classes"]) == 6
    captured = capsys.readouterr()
    assert "6 images" in captured.out and "6/6" in captured.err, "no progress was shown"

    truncate(folder / names[0])
    (folder / names[5]).unlink()
    assert tool.main([*arguments, "--report", str(report)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("note: ")]
    assert (
        len(lines) == 3
        and names[5] in lines[0]
        and names[0] in lines[1]
        and "4 images" in lines[2]
        and "2 issues" in lines[2]
    )
    found = json.loads(report.read_text())
    assert found["images_usable"] == 4 and [issue["where"] for issue in found["issues"]] == ["image 5", "image 0"]

    assert tool.main([*arguments, "--no-images"]) == 1
    assert names[0] not in capsys.readouterr().out


def test_nothing_readable_is_unusable(shapes, tool, capsys):
    json_file, folder, names = shapes
    for name in names:
        truncate(folder / name)
    assert tool.main(["--json", str(json_file), "--images", str(folder), "--processes", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "none of its 6 images" in captured.err.splitlines()[-1]


def test_invalid_arguments_are_one_line(shapes, tool, tmp_path, capsys):
    arguments = ["--json", str(shapes[0]), "--images", str(shapes[1]), "--processes"]
    with pytest.raises(SystemExit, match="2"):
        tool.main([*arguments, "0"])
    assert "--processes=0" in capsys.readouterr().err
    assert tool.main([*arguments, "1", "--report", str(tmp_path / "none" / "report.json")]) == 2
    assert "--report" in capsys.readouterr().err.splitlines()[-1]


def test_tool_writes_both_reports(shapes, tool, tmp_path, capsys):
    json_file, folder, names = shapes
    truncate(folder / names[0])
    arguments = ["--json", str(json_file), "--images", str(folder), "--processes", "1"]
    reports = [tmp_path / "a.json", tmp_path / "b.HTML"]
    flags = [flag for path in reports for flag in ("--report", str(path))]
    assert tool.main([*arguments, *flags]) == 1
    assert json.loads(reports[0].read_text())["images_usable"] == 5
    page = reports[1].read_text()
    assert page.startswith("<!DOCTYPE html>") and "the file cannot be decoded" in page
    assert tool.main([*arguments, "--no-images", *flags]) == 0
    assert "Image headers only were read" in reports[1].read_text()

    capsys.readouterr()
    for name in ("a.txt", "report"):
        with pytest.raises(SystemExit, match="2"):
            tool.main([*arguments, "--report", str(tmp_path / name)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"--report={tmp_path / name} is invalid" in error and ".json or .html" in error
    (tmp_path / "c.html").mkdir()
    assert tool.main([*arguments, *flags, "--report", str(tmp_path / "c.html")]) == 2
    error = capsys.readouterr().err
    assert "reading images" not in error and f"--report {tmp_path / 'c.html'} cannot be written" in error


def test_tool_lists_the_images_that_training_skips(shapes, tool, tmp_path):
    """Truncated file, one and all annotations invalid, only a crowd, no annotation: same result as the mapper's."""
    json_file, folder, names = shapes
    data = json.loads(json_file.read_text())
    box = {"category_id": 1, "iscrowd": 0, "bbox": [1, 1, 9, 9], "area": 81, "segmentation": [[1, 1, 10, 1, 10, 10]]}
    whole = [{**box, "image_id": n, "id": 100 + n} for n in (0, 1, 2)]
    broken = [{**box, "image_id": n, "id": 200 + n, "bbox": [5, 5, 0, 3], "segmentation": None} for n in (1, 3)]
    crowds = [{**box, "image_id": n, "id": 300 + n, "iscrowd": 1} for n in (3, 4)]
    data["annotations"] = whole + broken + crowds
    truncate(folder / names[2])
    odd, report = tmp_path / "odd.json", tmp_path / "report.json"
    odd.write_text(json.dumps(data))
    assert tool.main(["--json", str(odd), "--images", str(folder), "--processes", "1", "--report", str(report)]) == 1
    found = json.loads(report.read_text())
    skipped = {issue["where"] for issue in found["issues"] if issue["action"] == "skipped in training"}
    assert skipped == {"image 2", "image 3"} and found["images_usable"] == 4

    cfg = load_config("quick/mask_rcnn_halo_shapes")
    mapper = RobustDatasetMapper(cfg, is_train=True, max_consecutive=100)
    entries = load_coco_json(str(odd), str(folder), "test_left_out")
    for entry in entries:
        validate_record(entry, need_mask=True)
    assert {f"image {entry['image_id']}" for entry in entries if mapper(entry) is None} == skipped
    kept = validate_coco(odd, folder, require_annotations=True).dataset
    assert [image["id"] for image in kept["images"]] == [0, 1, 2, 4, 5] and {
        a["image_id"] for a in kept["annotations"]
    } == {0, 1, 2, 4}


def test_unwritable_report_is_an_error_before_images_are_read(shapes, tool, tmp_path, capsys):
    assert (
        tool.main(
            ["--json", str(shapes[0]), "--images", str(shapes[1]), "--report", str(tmp_path / "none" / "report.json")]
        )
        == 2
    )
    assert "reading images" not in capsys.readouterr().err


def test_ctrl_c_keeps_the_issues_found_so_far(shapes, tool, tmp_path, monkeypatch, capsys):
    json_file, folder, names = shapes
    truncate(folder / names[0])
    read = []

    def read_and_interrupt(path):
        read.append(path)
        if len(read) == 3:
            signal.raise_signal(signal.SIGINT)
        return read_image(path)

    monkeypatch.setattr(module, "read_image", read_and_interrupt)
    report, page, handler = tmp_path / "report.json", tmp_path / "report.html", signal.getsignal(signal.SIGINT)
    arguments = ["--json", str(json_file), "--images", str(folder), "--processes", "1", "--report", str(report)]
    arguments += ["--report", str(page)]
    assert tool.main(arguments) == 130 and len(read) == 3
    first, last = (line for line in capsys.readouterr().out.splitlines() if not line.startswith("note: "))
    assert "truncated" in first and "3 of 6 images" in last and "1 issues" in last
    found = json.loads(report.read_text())
    assert found["images_usable"] is None and [issue["where"] for issue in found["issues"]] == ["image 0"]
    assert signal.getsignal(signal.SIGINT) is handler and "Interrupted after 3 of 6 images" in page.read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_ctrl_c_in_a_terminal_reaches_all_processes(shapes, monkeypatch, capfd):
    """A terminal sends SIGINT to the workers too, which must ignore it and finish what they read."""
    json_file, folder, names = shapes
    truncate(folder / names[0])
    data = json.loads(json_file.read_text())
    data["images"] += [{**data["images"][1], "id": number} for number in range(1000, 1994)]
    json_file.write_text(json.dumps({**data, "annotations": []}))
    checked = validate_coco(json_file, folder)

    class InterruptingBar(module.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == 5:
                for process in (*(child.pid for child in multiprocessing.active_children()), os.getpid()):
                    os.kill(process, signal.SIGINT)
                time.sleep(0.1)

    monkeypatch.setattr(module, "tqdm", InterruptingBar)
    with pytest.raises(CheckInterrupted) as error:
        check_images(checked, processes=2)
    assert 5 <= error.value.num_read < 1000 and [issue.where for issue in error.value.issues] == ["image 0"]
    assert not multiprocessing.active_children() and "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(
    not BAD_IMAGES.is_dir(), reason=f"no folder {BAD_IMAGES}; set DETECTRON2_DATASETS to one with bad_inputs"
)
def test_unreadable_real_files_are_found(tmp_path):
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
    issues = [
        issue for issue in (*checked.issues, *check_images(checked, processes=1)) if issue.where.startswith("image ")
    ]
    assert sorted(int(issue.where.split()[1]) for issue in issues) == bad
