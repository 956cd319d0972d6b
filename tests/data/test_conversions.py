"""Values in the forms that real exporters write: converted where they have one meaning, each kind in one line."""

import json
import unicodedata
import uuid
from pathlib import Path

from halodet.data import validate_coco
from halodet.data.annotation_screen import find_plain
from halodet.data.annotation_validator import AnnotationValidator
from halodet.data.conversions import id_key, to_flag, to_int, to_number, turn_annotation, turn_rle
from halodet.data.issues import IssueLog
from halodet.errors import DatasetError

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

WIDTH, HEIGHT = 61, 43
NAN = float("nan")
POLYGON = [10, 10, 30, 10, 30, 33, 10, 33]


def rle(compressed=True):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:33, 10:30] = 1
    encoded = mask_util.encode(np.asfortranarray(mask))
    if compressed:
        return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    edges = [0, *(np.flatnonzero(np.diff(mask.flatten(order="F"))) + 1).tolist(), mask.size]
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(edges).tolist()}


def good():
    """Two images and three annotations that need no change."""
    common = {"bbox": [10, 10, 20, 23], "area": 460, "iscrowd": 0, "segmentation": [POLYGON]}
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (1, 2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, **common}
            for n, image, category in ((1, 1, 3), (2, 1, 5), (3, 2, 5))
        ],
    }


@pytest.fixture
def check(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{number}.png")

    def run(data, **options):
        (tmp_path / "a.json").write_text(json.dumps(data), encoding="utf-8")
        return validate_coco(tmp_path / "a.json", folder, **options)

    return run


def change_all(key, convert):
    """Return a change of one value of all annotations."""

    def change(data):
        for annotation in data["annotations"]:
            annotation[key] = convert(annotation[key])

    return change


def change_images(**convert):
    def change(data):
        for image in data["images"]:
            image.update({key: function(image[key]) for key, function in convert.items()})

    return change


def text_ids(data):
    for kind in ("images", "categories", "annotations"):
        for entry in data[kind]:
            entry.update({key: str(value) for key, value in entry.items() if key == "id" or key.endswith("_id")})


def float_ids(data):
    for kind in ("images", "categories", "annotations"):
        for entry in data[kind]:
            entry.update({key: float(value) for key, value in entry.items() if key == "id" or key.endswith("_id")})


def repeat_categories(data):
    data["categories"] *= 2


def no_file_names(data):
    for image in data["images"]:
        image["coco_url"] = f"http://images.example.org/{image.pop('file_name')}"
        image["neg_category_ids"] = [3]


# What is changed in a json, and the number of lines: one for each kind of value.
CONVERSIONS = {
    "text ids": (text_ids, 5),
    "float ids": (float_ids, 5),
    "float sizes": (change_images(width=float, height=float), 1),
    "text sizes": (change_images(width=str, height=str), 1),
    "no sizes": (change_images(width=lambda v: None, height=lambda v: None), 1),
    "sizes of 0": (change_images(width=lambda v: 0, height=lambda v: 0), 1),
    "flag as text": (change_all("iscrowd", str), 1),
    "flag as float": (change_all("iscrowd", float), 1),
    "flag as bool": (change_all("iscrowd", bool), 1),
    "flag as word": (change_all("iscrowd", lambda v: "false"), 1),
    "box as text": (change_all("bbox", lambda box: [str(v) for v in box]), 1),
    "area as text": (change_all("area", str), 1),
    "flat polygon": (change_all("segmentation", lambda mask: mask[0]), 1),
    "polygon as text": (change_all("segmentation", lambda mask: [[f" {v}.0 " for v in mask[0]]]), 1),
    "points": (change_all("segmentation", lambda mask: np.reshape(mask[0], (-1, 2)).tolist()), 1),
    "list of points": (change_all("segmentation", lambda mask: [np.reshape(mask[0], (-1, 2)).tolist()]), 1),
    "points with names": (
        change_all("segmentation", lambda m: [{"x": x, "y": y} for x, y in np.reshape(m[0], (-1, 2)).tolist()]),
        1,
    ),
    "categories per image": (repeat_categories, 1),
    "names from coco_url": (no_file_names, 1),
    "separators of Windows": (change_images(file_name=lambda name: f".\\{name}"), 1),
    "folders of another machine": (change_images(file_name=lambda name: rf"C:\Users\me\{name}"), 1),
    "absolute paths": (change_images(file_name=lambda name: f"/home/other/{name}"), 1),
    "an image twice": (lambda data: data["images"].append(dict(data["images"][0])), 1),
    "an image under two ids": (lambda data: data["images"].append({**data["images"][0], "id": 9}), 1),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_form_of_one_meaning_is_converted_in_one_line(check, name):
    change, lines = CONVERSIONS[name]
    expected = check(good(), require_annotations=True)
    assert expected.issues == []
    data = good()
    change(data)
    checked = check(data, require_annotations=True)
    assert len(checked.issues) == lines, [str(issue) for issue in checked.issues]
    for kind in ("images", "categories", "annotations"):
        assert [dict(sorted(entry.items())) for entry in checked.dataset[kind]] == [
            dict(sorted(entry.items())) for entry in expected.dataset[kind]
        ]


def test_annotations_of_an_image_under_two_ids_are_those_of_one(check):
    data = good()
    data["images"].append({**data["images"][1], "id": 9})
    data["annotations"].append({**data["annotations"][0], "id": 4, "image_id": 9})
    checked = check(data)
    assert [a["image_id"] for a in checked.dataset["annotations"]] == [1, 1, 2, 2]


@pytest.mark.parametrize("name", [lambda v: str(uuid.UUID(int=v)), lambda v: v + 10**30, lambda v: f"frame {v}"])
def test_ids_that_are_no_numbers_are_renumbered(check, name):
    data = good()
    for kind in ("images", "categories", "annotations"):
        for entry in data[kind]:
            entry.update({key: name(value) for key, value in entry.items() if key == "id" or key.endswith("_id")})
    checked = check(data)
    images = {image["id"]: image["file_name"] for image in checked.dataset["images"]}
    classes = {category["id"]: category["name"] for category in checked.dataset["categories"]}
    assert all(type(number) is int for number in (*images, *classes))
    found = [(images[a["image_id"]], classes[a["category_id"]]) for a in checked.dataset["annotations"]]
    assert found == [("1.png", "cat"), ("1.png", "dog"), ("2.png", "dog")]
    assert len({a["id"] for a in checked.dataset["annotations"]}) == 3 and len(checked.issues) == 5


def test_names_that_are_numbers_are_text(check):
    data = good()
    data["categories"][0]["name"], data["categories"][1]["name"] = 7, 2.0
    checked = check(data)
    assert checked.class_names == ["7", "2"] and len(checked.issues) == 1


@pytest.mark.parametrize("compressed", [True, False])
def test_a_list_of_one_rle_is_that_rle(check, compressed):
    data = good()
    change_all("segmentation", lambda mask: [rle(compressed)])(data)
    checked = check(data)
    assert [a["segmentation"] for a in checked.dataset["annotations"]] == [rle(compressed)] * 3
    assert len(checked.issues) == 1


def test_rle_of_floats_and_text(check):
    data = good()
    mask = rle(compressed=False)
    mask = {"size": [str(v) for v in mask["size"]], "counts": [float(v) for v in mask["counts"]]}
    change_all("segmentation", lambda _: mask)(data)
    assert [a["segmentation"] for a in check(data).dataset["annotations"]] == [rle(compressed=False)] * 3


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_unicode_forms_of_a_name_are_one_name(check, tmp_path, written):
    other = {"NFC": "NFD", "NFD": "NFC"}[written]
    name = unicodedata.normalize(other, "Bär é ガ.png")
    folder = tmp_path / "images" / unicodedata.normalize(other, "straße ä")
    folder.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    data = good()
    data["images"][0]["file_name"] = unicodedata.normalize(written, f"{folder.name}/{name}")
    checked = check(data)
    assert len(checked.issues) == 1 and len(checked.dataset["annotations"]) == 3
    assert (tmp_path / "images" / checked.dataset["images"][0]["file_name"]).is_file()


def test_empty_masks_are_no_masks(check):
    for empty in ([], [[]], {}, "", None):
        data = good()
        change_all("segmentation", lambda mask, empty=empty: empty)(data)
        checked = check(data, need_masks=False)
        assert checked.issues == [] and all("segmentation" not in a for a in checked.dataset["annotations"])
        with pytest.raises(DatasetError, match="MODEL.MASK_ON"):
            check(data)


def test_what_has_no_single_meaning_is_not_converted(check):
    data = good()
    data["annotations"][0]["image_id"] = "first"
    data["annotations"][1].update(bbox=["ten", 10, 20, 20], segmentation=["ten", 10, 20, 20, 30, 30])
    data["annotations"][2]["iscrowd"] = "maybe"
    checked = check(data)
    assert checked.dataset["annotations"] == []
    assert [word in str(issue) for word, issue in zip(("first", "ten", "maybe"), checked.issues, strict=False)] == [
        True, True, True
    ]  # fmt: skip


def test_numbers():
    assert [to_int(v) for v in (3, 3.0, "3", " 3.0 ", "-4", 3.5, "3.5", "x", True, None, NAN, "1e3", 2**60)] == [
        3, 3, 3, 3, -4, None, None, None, None, None, None, None, None
    ]  # fmt: skip
    assert [to_number(v) for v in ("3", "3.5", "-1e2", "nan", "inf", "", "1_0", None, 7)] == [
        3, 3.5, -100.0, "nan", "inf", "", "1_0", None, 7
    ]  # fmt: skip
    assert [to_flag(v) for v in ("0", "1", 0.0, 1.0, False, True, "False", "yes", "x", 2, None)] == [
        0, 1, 0, 1, 0, 1, 0, 1, "x", 2, None
    ]  # fmt: skip
    assert [id_key(v) for v in (1, 1.0, "1", "a", True, None, [], 10**20)] == [
        1,
        1,
        1,
        "a",
        None,
        None,
        None,
        str(10**20),
    ]


# Orientation: Pillow's operation that turns the file upright.
TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_annotations_turn_with_the_image(orientation):
    polygon = [4, 3, 20, 3, 20, 9, 30, 9, 30, 30, 4, 30]
    mask = mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))
    raw = mask_util.decode(mask)
    expected = np.asarray(Image.fromarray(raw).transpose(TURNS[orientation]))
    entry = {"bbox": [4, 3, 26, 27], "segmentation": [polygon], "keypoints": [4, 3, 2, 0, 0, 0]}
    turned = turn_annotation(entry, orientation, WIDTH, HEIGHT)
    drawn = mask_util.decode(mask_util.merge(mask_util.frPyObjects(turned["segmentation"], WIDTH, HEIGHT)))
    assert (drawn != expected).sum() <= 2  # pycocotools rounds the two sides of a polygon differently
    ys, xs = np.nonzero(expected)
    assert turned["bbox"] == [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
    marked = np.zeros((HEIGHT, WIDTH), np.uint8)
    marked[3, 4] = 1  # the pixel of the keypoint
    ((y, x),) = np.argwhere(np.asarray(Image.fromarray(marked).transpose(TURNS[orientation])))
    assert turned["keypoints"] == [x, y, 2, 0, 0, 0]
    for counts in (mask["counts"].decode(), rle_counts(raw)):
        found = turn_rle({"size": [HEIGHT, WIDTH], "counts": counts}, orientation)
        assert found["size"] == [WIDTH, HEIGHT] and (mask_util.decode(found) == expected).all()


def rle_counts(mask):
    flat = mask.flatten(order="F")
    return np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]).tolist()


@pytest.mark.parametrize("orientation", TURNS)
def test_the_size_before_rotation_is_recognized(check, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "1.png", exif=exif)
    data = good()
    data["annotations"][1]["segmentation"] = rle()
    checked = check(data)
    (issue,) = checked.issues
    assert f"orientation {orientation}" in str(issue) and "1 of 2" in str(issue)
    assert (checked.dataset["images"][0]["width"], checked.dataset["images"][0]["height"]) == (HEIGHT, WIDTH)
    polygon, mask, other = checked.dataset["annotations"]
    assert polygon["bbox"] == mask["bbox"] == mask_util.toBbox(mask["segmentation"]).tolist() != other["bbox"]


def test_a_square_image_does_not_tell_whether_it_is_turned(check, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (43, 43)).save(tmp_path / "images" / "1.png", exif=exif)
    data = good()
    data["images"][0].update(width=43, height=43)
    assert check(data).issues == [] and check(data).dataset["annotations"] == data["annotations"]


def test_fractions_are_those_of_the_image_before_rotation(check, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{number}.png", exif=exif)
    whole = check(good())
    data = good()
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
        annotation["segmentation"] = [[v / (HEIGHT if i % 2 else WIDTH) for i, v in enumerate(POLYGON)]]
    data["images"].append({"id": 3, "file_name": "3.png", "width": WIDTH, "height": HEIGHT})
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "3.png")
    for number in range(4, 10):  # from which the form of the masks is found
        data["annotations"].append({**data["annotations"][0], "id": number, "image_id": 3, "area": number})
        data["annotations"][-1]["bbox"] = [0.01 * number, *data["annotations"][0]["bbox"][1:]]
    boxes = [annotation["bbox"] for annotation in check(data).dataset["annotations"][:3]]
    assert np.allclose(boxes, [annotation["bbox"] for annotation in whole.dataset["annotations"]])


def test_names_that_end_alike_are_not_one_image(check, tmp_path):
    """As with the frames of two videos, of which only one is in the folder."""
    data = good()
    data["images"] = [
        {"id": 1, "file_name": "v1/1.png", "width": WIDTH, "height": HEIGHT},
        {"id": 2, "file_name": "v2/1.png", "width": WIDTH, "height": HEIGHT},
    ]
    with pytest.raises(DatasetError, match="v1/1.png"):
        check(data)
    data["images"][1]["file_name"] = "v2/2.png"
    assert len(check(data).dataset["images"]) == 2


def test_images_with_one_id_are_skipped_with_their_annotations(check):
    data = good()
    data["images"].append({**data["images"][1], "id": 1})
    for evaluation in (False, True):
        checked = check(data, evaluation=evaluation)
        assert [image["id"] for image in checked.dataset["images"]] == [2]
        assert [a["id"] for a in checked.dataset["annotations"]] == [3]
        assert [issue.where for issue in checked.issues] == ["image 1", "image 1"]
        assert all("2 annotations" in issue.action and "2.png" in issue.reason for issue in checked.issues)


def test_texts_that_are_one_number_are_two_ids(check):
    data = good()
    data["images"][0]["id"], data["images"][1]["id"] = "1", "01"
    for annotation, image_id in zip(data["annotations"], ("1", "01", "01"), strict=True):
        annotation["image_id"] = image_id
    checked = check(data)
    names = {image["id"]: image["file_name"] for image in checked.dataset["images"]}
    found = {names[a["image_id"]] for a in checked.dataset["annotations"][1:]}  # the third repeats the second
    assert names[checked.dataset["annotations"][0]["image_id"]] == "1.png" and found == {"2.png"}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["annotations"][0].update(segmentation=[[]]),
        lambda data: data["annotations"][0].update(ignore=None),
        lambda data: data["categories"][0].update(keypoints=["nose"]),
    ],
    ids=["empty mask", "ignore null", "no keypoints"],
)
def test_a_file_that_others_read_differently_is_not_copied(check, tmp_path, change):
    data = {**good(), "info": {}}
    assert check(data, need_masks=False).unchanged
    change(data)
    checked = check(data, need_masks=False)
    assert not checked.unchanged and checked.issues == []
    checked.save(tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_text()) == checked.dataset


def test_each_object_has_the_keypoints_of_the_first_class_that_has_them(check):
    data = good()
    data["categories"][1]["keypoints"] = ["nose", "tail"]
    data["annotations"][1]["keypoints"] = [12, 13, 2, 20, 21, 1]
    checked = check(data)
    assert [a["keypoints"] for a in checked.dataset["annotations"]] == [[0] * 6, [12, 13, 2, 20, 21, 1], [0] * 6]


def test_many_masks_in_one_box_are_fast_and_stay(check):
    data = good()
    first = data["annotations"][0]
    data["annotations"] = [{**first, "id": n + 1, "segmentation": [[*POLYGON, 10 + n / 1000, 20]]} for n in range(6000)]
    assert len(check(data).dataset["annotations"]) == 6000


def random_annotation(rng):
    """A valid annotation, changed in up to two values."""
    x, y, w, h = rng.uniform(0, 20, 4).round(int(rng.integers(0, 3))).tolist()
    entry = {
        "id": int(rng.integers(0, 50)), "image_id": int(rng.integers(1, 4)), "category_id": int(rng.choice([3, 5, 7])),
        "bbox": [x, y, w + 1, h + 1], "segmentation": [[x, y, x + w + 1, y, x + w + 1, y + h + 1]],
        "area": 5.0, "iscrowd": int(rng.random() < 0.1), "extra": 1,
    }  # fmt: skip
    values = [None, 0, -3, 1e12, float("nan"), float("inf"), "4", True, [], {}, [[]], [1, 2, 3, 4], [0, 0, 90, 90],
              [[0, 0, 9, 0, 9, 9], [1, 2]], [[-0.5, 0, 61.9, 0, 61.9, 43.2]], [[5, 5, 5, 5, 5, 5]], rle(), 10**400,
              [50, 40, 11.5, 3.2], [[float("nan"), 1, 2, 3, 4, 5]], [[1, 1, 2, True, 3, 3]]]  # fmt: skip
    for _ in range(rng.integers(0, 3)):
        key = str(rng.choice(sorted(entry)))
        entry[key] = values[rng.integers(len(values))]
        if rng.random() < 0.1:
            del entry[key]
    return entry


@pytest.mark.parametrize("need_masks", [True, False])
def test_annotations_found_plain_are_those_the_validator_leaves_alone(need_masks):
    rng = np.random.default_rng(0)
    images = {k: {"id": k, "file_name": "x", "width": WIDTH, "height": HEIGHT} for k in (1, 2)}
    categories = {3: {"id": 3, "name": "cat"}, 5: {"id": 5, "name": "dog"}}
    sizes = {k: (WIDTH, HEIGHT) for k in images}
    num_plain = 0
    for _ in range(300):
        entries = [random_annotation(rng) for _ in range(rng.integers(1, 8))]
        for entry, is_plain in zip(entries, find_plain(entries, sizes, categories, need_masks=need_masks), strict=True):
            if not is_plain:
                continue
            num_plain += 1
            log = IssueLog(Path("a.json"))
            valid = AnnotationValidator(log, images, categories, {}, need_masks, False).validate(entry, "")
            log.report_counted("annotations", 1)
            assert log.issues == []
            assert valid == {key: entry[key] for key in valid}
    assert num_plain > 150
