"""The HTML report: its numbers are right, nothing of the dataset is markup, and it stays small."""

import base64
import io
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

from halodet.data import ValidatedCoco, coco_validator, dataset_report, report_charts, validate_coco, write_shapes
from halodet.data.coco_validator import CocoValidator
from halodet.data.dataset_report import count_classes, count_usable_images, make_report, write_html_report
from halodet.data.issues import Issue
from halodet.data.thumbnails import choose_colors, draw_annotations, jpeg_data_uri

import numpy as np
import pycocotools.mask as mask_util
import pytest
from helpers import truncate
from PIL import Image

VOID = {"meta", "img", "br"}
HOSTILE = [
    "<script>alert(1)</script>", "</style><b>&amp;", "'\"><img src=x onerror=alert(1)>", "無花果 한국어", "תאנה تين",
    "\u202egnp.exe", "name_" * 500, "\ud800 \x00 \x1b[31m",
]  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes, text and tables of a page; checks that each tag is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.text = Counter(), [], [], ""
        self.tables, self.classed = {}, []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag in VOID:
            return
        self.open.append((tag, dict(attrs).get("class") or ""))
        self.classed.append([self.open[-1][1], ""])
        self.open[-1] += (self.classed[-1],)
        if tag == "table":
            self.rows = []
        elif tag == "caption":
            self.caption = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open)
        self.open.pop()
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        names = [entry[0] for entry in self.open]
        if "style" in names:
            return
        self.text += data
        for *_, element in self.open:
            element[1] += data
        if "caption" in names:
            self.caption += data
        if "td" in names or "th" in names:
            self.rows[-1][-1] += data

    def all(self, name):
        """Return the text of each element of a class."""
        return [text for classes, text in self.classed if name in classes.split()]

    def images(self):
        """Return the decoded thumbnails."""
        uris = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(uri.startswith("data:image/jpeg;base64,") for uri in uris)
        return [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB") for uri in uris]


def write(tmp_path, checked, folder, issues=None, **more):
    path = tmp_path / "report.html"
    issues = checked.issues if issues is None else issues
    write_html_report(path, checked, issues, images_usable=count_usable_images(checked, issues), **more)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<iframe|https?:|url\(|@import", text)
    return Page(text), text


@pytest.fixture
def shapes(tmp_path):
    """(json, folder, dict) of 6 scenes."""
    json_file, folder = write_shapes(tmp_path / "shapes", "train", 6), tmp_path / "shapes" / "train"
    return json_file, folder, json.loads(json_file.read_text())


def change(shapes, change_dict):
    json_file, folder, data = shapes
    change_dict(data)
    json_file.write_text(json.dumps(data))
    return validate_coco(json_file, folder)


def number(text):
    return int(text.replace(",", ""))


def test_tables_have_the_counts_of_the_json(shapes, tmp_path):
    def add_crowd(data):
        data["annotations"][0]["iscrowd"] = 1
        shutil.copy(shapes[1] / data["images"][0]["file_name"], shapes[1] / "empty.png")
        data["images"].append({**data["images"][0], "id": 100, "file_name": "empty.png"})

    checked = change(shapes, add_crowd)
    page, _ = write(tmp_path, checked, shapes[1])
    data = json.loads(shapes[0].read_text())
    objects = [a for a in data["annotations"] if not a["iscrowd"]]

    (classes,) = (rows for caption, rows in page.tables.items() if caption.startswith("Count"))
    assert classes[0] == ["class", "count", "share", "", "images", "crowds", "size", "id", "index"]
    found = {row[0]: row for row in classes[1:]}
    assert len(found) == len(data["categories"])
    counts = [number(row[1]) for row in classes[1:]]
    assert counts == sorted(counts, reverse=True) and sum(counts) == len(data["annotations"])
    for index, category in enumerate(data["categories"]):
        of_class = [a for a in data["annotations"] if a["category_id"] == category["id"]]
        sizes = [a["area"] ** 0.5 for a in of_class if not a["iscrowd"]]
        size = f"{np.median(sizes):.0f}" if sizes else "–"
        images, crowds = len({a["image_id"] for a in of_class}), len(of_class) - len(sizes)
        row = found[category["name"]]
        assert row[1:2] + row[4:] == [*map(str, (len(of_class), images, crowds)), size, str(category["id"]), str(index)]

    sizes = page.tables["Object sizes"]
    groups = [number(row[1]) for row in sizes if row[0].startswith(("small", "medium", "large"))]
    areas = np.array([a["area"] for a in objects])
    assert groups == [(areas < 32**2).sum(), ((areas >= 32**2) & (areas < 96**2)).sum(), (areas >= 96**2).sum()]
    assert sum(number(row[-2]) for row in sizes[1:] if re.match(r"\d|under", row[0])) == len(objects)

    per_image = Counter(Counter(a["image_id"] for a in objects)[i["id"]] for i in data["images"])
    rows = page.tables["Objects per image"][1:]
    assert {int(row[0]): number(row[2]) for row in rows if row[2] != "0"} == per_image
    assert [number(row[2]) for row in page.tables["Image sizes"][1:]] == [7]
    tiles = [text for text in page.all("tile")]
    assert [re.match(r"\D+(\d+)", tile)[1] for tile in tiles] == ["7", str(len(data["annotations"])), "6", "0"]
    assert "No issues were found." in page.text and len(page.images()) == sum(
        1 for objects in per_image.elements() if objects
    )


def test_bins_of_many_objects_and_large_images():
    counts = np.array([0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33])
    assert report_charts.count_bins(counts) == [
        ("0", 1), ("1", 1), ("2", 1), ("3–4", 2), ("5–8", 2), ("9–16", 2), ("17–32", 1), ("33–64", 1)
    ]  # fmt: skip
    assert report_charts.count_bins(np.array([2, 4])) == [("2", 1), ("3", 0), ("4", 1)]
    assert report_charts.count_bins(np.array([0, 0])) == [("0", 2)]
    labels, found = report_charts.bin_edges(np.array([31.9, 32, 95.9, 96, 5000]), (32, 96), right=False)
    assert (labels, found) == (["under 32", "32–96", "96 and more"], [1, 2, 2])
    labels, found = report_charts.bin_edges(np.array([640, 641, 800, 801]), (640, 800), right=True)
    assert (labels, found) == (["up to 640", "641–800", "801 and more"], [1, 2, 1])


def test_names_and_issues_are_text(shapes, tmp_path):
    def use_names(data):
        names = iter(HOSTILE)
        for category in data["categories"]:
            category["name"] = next(names)
        for image, name in zip(data["images"], (f"{n} <b>&'\".png" for n in range(3)), strict=False):
            (shapes[1] / image["file_name"]).rename(shapes[1] / name)
            image["file_name"] = name
        data["annotations"][0]["bbox"] = ["<script>", "'&\"", 1, 2]
        data["annotations"][1]["iscrowd"] = HOSTILE[-1]
        data["images"][4]["file_name"] = HOSTILE[0]
        data["categories"].append({"id": 99, "name": HOSTILE[-1]})

    folder = shapes[1].rename(tmp_path / "a <i>&folder")
    shapes = shapes[0], folder, shapes[2]
    checked = change(shapes, use_names)
    page, text = write(tmp_path, checked, folder, remark="<u>")
    allowed = (
        "html head meta title style body header main footer nav section p br a h1 h2 h3 dl div dt dd b span ol ul li "
        "details summary figure img figcaption i table caption thead tbody tr th td bdi"
    )
    assert set(page.tags) <= set(allowed.split())
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in ("srcdoc", "formaction")]
    for name in HOSTILE[:6]:
        assert name in page.text, name
    assert "0 <b>&'\".png" in page.text and "<u>" in page.text and "a <i>&folder" in page.text
    assert any("0 <b>&'\".png" in value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    assert "\x00" not in text and "\x1b" not in text and "name_" * 30 not in text


def test_issues_are_grouped_by_kind(tmp_path):
    def issue(where, reason, action="skipped", image_id=None):
        return Issue("a.json", where, reason, action, image_id)

    issues = [
        issue("annotations", "7 of 9 have an area of 0, the first is annotation 4", "computed"),
        *(issue(f"annotation {n}", f"bbox=[{n}, 1, 'a'] is invalid: expected 4 numbers", image_id=n) for n in range(3)),
        issue("image 5", "'a b' is not in /data/it's 1"),
        issue("image 6", "'c d' is not in /data/it's 1"),
    ]
    page, _ = write(tmp_path, empty(tmp_path), tmp_path, issues)
    assert page.all("count") == ["3", "2", "7"]
    assert page.all("what") == [
        "annotation …: bbox=… is invalid: expected 4 numbers", "image …: … is not in /data/it's 1",
        "annotations: have an area of 0",
    ]  # fmt: skip
    assert page.all("example")[-1] == "first: annotation 4" and page.all("action") == ["skipped", "skipped", "computed"]


def empty(tmp_path, images=(), annotations=(), names=("cat",)):
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    dataset = {"images": list(images), "annotations": list(annotations), "categories": categories}
    return ValidatedCoco(tmp_path / "a.json", tmp_path, dataset, [])


def test_dropped_annotations_are_shown_with_their_image(shapes, tmp_path):
    """The image with most issues comes first; a missing and a truncated image are placeholders with the reason."""

    def break_some(data):
        first = data["annotations"][0]
        flat = {**first, "image_id": 3, "segmentation": [[1, 1, 0, 5]]}
        data["annotations"] += [{**flat, "id": 1000 + n} for n in range(6)] + [{**flat, "id": 2000, "image_id": 2}]
        (shapes[1] / data["images"][5]["file_name"]).unlink()
        truncate(shapes[1] / data["images"][2]["file_name"])

    checked = change(shapes, break_some)
    assert all(issue.image_id is not None for issue in checked.issues if issue.where.startswith("annotation "))
    page, _ = write(tmp_path, checked, shapes[1])
    names = [image["file_name"] for image in shapes[2]["images"]]
    titles = page.all("name")
    assert titles[0] == f"{names[3]} 7 issues"  # the last: all are invalid
    assert {re.match(rf"{names[2]}|image 5", title)[0] for title in titles[1:3]} == {names[2], "image 5"}
    truncated, skipped = sorted(page.all("placeholder"), reverse=True)
    assert skipped == "no image image skipped" and "the file cannot be decoded" in truncated
    assert page.text.count("has 4 numbers") >= 4 and "and 3 more" in page.text


def test_only_the_shown_images_are_read(shapes, tmp_path, monkeypatch):
    read, read_image = [], dataset_report.read_image
    monkeypatch.setattr(dataset_report, "read_image", lambda path: read.append(path) or read_image(path))
    data = shapes[2]
    given, data["images"] = data["images"], []
    for n in range(20):
        for image in given:
            name = f"{n}_{image['file_name']}"
            shutil.copy(shapes[1] / image["file_name"], shapes[1] / name)
            data["images"].append({**image, "id": 10 * n + image["id"], "file_name": name})
    data["annotations"] = [
        {**a, "id": 1000 * n + k + 1, "image_id": 10 * n + a["image_id"]}
        for n in range(20)
        for k, a in enumerate(data["annotations"])
    ]
    checked = change(shapes, lambda data: None)
    page, _ = write(tmp_path, checked, shapes[1])
    assert len(read) == len(page.images()) == 12


def test_samples_contain_as_many_classes_as_possible(tmp_path):
    names = [f"class {n}" for n in range(10)]
    images = [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(100)]
    box = {"bbox": [1, 1, 2, 2], "area": 4, "iscrowd": 0}
    annotations = [{**box, "id": n + 1, "image_id": n, "category_id": max(n - 89, 1)} for n in range(100)]
    for image in images:
        Image.new("RGB", (8, 8)).save(tmp_path / image["file_name"])
    page, _ = write(tmp_path, empty(tmp_path, images, annotations, names), tmp_path)
    assert {re.match(r"class \d", text)[0] for text in page.all("legend")} == set(names)
    assert len(page.images()) == 12


@pytest.mark.parametrize("size", [(600, 300), (300, 600), (48, 32), (3000, 2)], ids=str)
def test_thumbnails_have_the_aspect_and_the_drawn_boxes(size):
    width, height = size
    box = [width / 4, height / 4, width / 2, height / 2]
    annotation = {"id": 1, "image_id": 1, "category_id": 7, "bbox": box, "area": 1.0, "iscrowd": 0}
    image = np.full((height, width, 3), 128, np.uint8)
    drawn = draw_annotations(image, [annotation], {7: (255, 0, 0)})
    assert max(drawn.shape) == 480 and min(drawn.shape[:2]) == max(round(480 * min(size) / max(size)), 2)
    page_image = Image.open(io.BytesIO(base64.b64decode(jpeg_data_uri(drawn).split(",")[1]))).convert("RGB")
    pixels = np.asarray(page_image).astype(int)
    assert pixels.shape == drawn.shape
    if min(drawn.shape[:2]) > 20:
        middle, left, top = drawn.shape[0] // 2, drawn.shape[1] // 4, drawn.shape[0] // 4
        for y, x in ((middle, left), (middle, 3 * left), (top, 2 * left), (3 * top, 2 * left)):
            assert np.abs(pixels[y, x] - (255, 0, 0)).max() < 60, (y, x)
        assert np.abs(pixels[middle, 2 * left] - 128).max() < 12 and np.abs(pixels[5, 5] - 128).max() < 12


def test_masks_crowds_and_keypoints_are_drawn():
    mask = np.zeros((200, 400), np.uint8)
    mask[50:150, 200:300] = 1
    encoded = mask_util.encode(np.asfortranarray(mask))
    runs = np.diff(np.flatnonzero(np.diff(np.pad(mask.flatten("F"), 1, constant_values=2))))
    common = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 399, 199], "area": 10000.0, "iscrowd": 0}
    masks = [
        [[200, 50, 300, 50, 300, 150, 200, 150]],
        {"size": [200, 400], "counts": encoded["counts"].decode()},
        {"size": [200, 400], "counts": runs.tolist()},
    ]
    for segmentation in masks:
        annotation = {**common, "segmentation": segmentation, "keypoints": [100, 100, 2, 20, 20, 0]}
        drawn = draw_annotations(np.zeros((200, 400, 3), np.uint8), [annotation], {1: (0, 200, 0)}).astype(int)
        assert np.abs(drawn[120, 300] - (0, 70, 0)).max() < 3 and drawn[120, 200].max() == 0
        assert drawn[120, 120].tolist() == [0, 200, 0] and drawn[24, 24].max() == 0
        crowd = draw_annotations(np.zeros((200, 400, 3), np.uint8), [{**annotation, "iscrowd": 1}], {1: (0, 200, 0)})
        assert len(set(crowd[120, 300].tolist())) == 1 and crowd[120, 300].max() > 0


def test_classes_of_an_image_have_different_colors():
    ranks = {category: 100 - category for category in range(100)}
    for categories in (range(18), [10, 28, 46, 64], [99]):
        colors = choose_colors(ranks, categories)
        assert set(colors) == set(categories) and len(set(colors.values())) == len(colors)
    assert choose_colors(ranks, [64, 28])[64] == choose_colors(ranks, [64])[64]
    assert len(set(choose_colors(ranks, range(40)).values())) == 18


def test_page_stays_small(tmp_path):
    """5,000 issues of 5,000 forms, 2,000 classes, 40 images of noise, long names."""
    generator = np.random.default_rng(0)
    images = [{"id": n, "file_name": f"{n}{'é' * 100}.png", "width": 500, "height": 500} for n in range(40)]
    noise = Image.fromarray(generator.integers(0, 255, (500, 500, 3), np.uint8))
    for image in images:
        noise.save(tmp_path / image["file_name"])
    names = [f"{n} " + "名<" * 200 for n in range(2000)]
    box = {"bbox": [1, 1, 400, 400], "area": 1.6e5, "iscrowd": 0}
    annotations = [{**box, "id": n + 1, "image_id": n % 40, "category_id": n % 2000 + 1} for n in range(20000)]
    validator = CocoValidator(tmp_path / "a.json")
    for n in range(5000):
        validator.image_id = n % 20
        word = "".join(chr(97 + int(digit)) for digit in str(n))
        validator.report(f"annotation {n}", f"{word} {'<&' * 300}", "skipped")
    page, text = write(tmp_path, empty(tmp_path, images, annotations, names), tmp_path, validator.issues)
    assert len(text.encode()) < 2_000_000 and len(page.images()) == 20
    assert "and 4,970 more kinds" in page.text and "and 750 more classes" in page.text
    assert page.all("badge")[0] == "250 issues" and "and 246 more" in page.text and "the 200 largest drawn" in page.text


def test_dataset_without_annotations_has_a_page(tmp_path):
    image = {"id": 1, "file_name": "none.png", "width": 8, "height": 8}
    page, _ = write(tmp_path, empty(tmp_path, [image]), tmp_path)
    assert page.tables["Objects per image"][1][2] == "1" and not page.images()


def test_json_report_names_classes_and_images(shapes):
    checked = change(shapes, lambda data: data["annotations"][0]["bbox"].__setitem__(2, 0))
    report = json.loads(json.dumps(make_report(checked, checked.issues, images_usable=6)))
    assert report["images_usable"] == report["images"] == 6 and report["notes"] == checked.notes
    assert report["annotations"] == sum(entry["annotations"] for entry in report["classes"])
    assert [entry["name"] for entry in report["classes"]] == checked.class_names
    assert report["issues"][0]["image_id"] == shapes[2]["annotations"][0]["image_id"]
    assert count_classes(checked.dataset)[0].id == checked.dataset["categories"][0]["id"]


def test_long_checks_show_progress(shapes, monkeypatch, capsys):
    validate_coco(*shapes[:2])
    assert "checking annotations" not in capsys.readouterr().err
    monkeypatch.setattr(coco_validator, "_SHOW_ANNOTATIONS", 1)
    validate_coco(*shapes[:2])
    assert "checking annotations of train.json" in capsys.readouterr().err
