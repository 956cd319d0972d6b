"""Validation of COCO jsons: each invalid entry is skipped and listed, and the rest is safe for pycocotools."""

import copy
import json
import os
import re
from pathlib import Path

from halodet.data import match_categories, register_validated, validate_coco
from halodet.data.annotations import mask_area
from halodet.data.coco import restore_parent
from halodet.errors import DatasetError

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from helpers import load_tool
from PIL import Image
from pycocotools.coco import COCO

WIDTH, HEIGHT = 60, 40
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
NAN, INF = float("nan"), float("inf")


def rle(compressed=True):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:20, 7:33] = 1
    mask[8:12, 10:20] = 0
    encoded = mask_util.encode(np.asfortranarray(mask))
    if compressed:
        return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    flat = mask.flatten(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(edges).tolist()}


def good():
    def annotation(number, image_id, category_id, **more):
        common = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0, "segmentation": [SQUARE]}
        return {"id": number, "image_id": image_id, "category_id": category_id, **common, **more}

    return {
        "info": {"year": 2017},
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT, "date_captured": "today"}
            for n in (1, 2)
        ],
        "categories": [{"id": 90, "name": "dog", "supercategory": "animal"}, {"id": 7, "name": "cat", "keypoints": []}],
        "annotations": [
            annotation(11, 1, 90),
            annotation(12, 1, 7, bbox=[7, 5, 26, 15], segmentation=rle(), keypoints=[1, 2, 3]),
            annotation(13, 2, 7, bbox=[7, 5, 26, 15], segmentation=rle(compressed=False), iscrowd=1),
        ],
    }


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def check(tmp_path, images):
    def run(data, **options):
        path = tmp_path / "a.json"
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        return validate_coco(path, images, **options)

    return run


def changed(*path, value=None, drop=False):
    data = good()
    *parents, last = path
    target = data
    for step in parents:
        target = target[step]
    if drop:
        del target[last]
    else:
        target[last] = value
    return data


def kept_ids(checked):
    return [annotation["id"] for annotation in checked.dataset["annotations"]]


def test_good_file_is_clean_and_only_needed_keys_are_kept(check):
    checked = check(good(), require_annotations=True)
    assert checked.issues == []
    assert checked.class_names == ["cat", "dog"]
    data = good()
    for image in data["images"]:
        del image["date_captured"]
    del data["annotations"][1]["keypoints"], data["categories"][1]["keypoints"]
    data["categories"].reverse()
    assert checked.dataset == data


@pytest.mark.parametrize("fault", ["missing", "not an image", "another size"])
def test_ground_truth_of_unusable_images_stays_in_an_evaluation(check, images, fault):
    file = images / "1.png"
    if fault == "missing":
        file.unlink()
    elif fault == "not an image":
        file.write_text("nothing")
    else:
        Image.new("RGB", (WIDTH + 1, HEIGHT)).save(file)
    assert kept_ids(check(good())) == [13]
    checked = check(good(), evaluation=True)
    assert kept_ids(checked) == [11, 12, 13] and [image["id"] for image in checked.dataset["images"]] == [1, 2]
    (issue,) = checked.issues
    assert issue.where == "image 1" and "2 annotations" in issue.action
    (images / "2.png").unlink()
    if fault == "missing":
        with pytest.raises(DatasetError, match="2 images"):
            check(good(), evaluation=True)


def test_boxes_without_masks_stay_in_an_evaluation(check):
    data = changed("annotations", 0, "segmentation", value=[])
    assert kept_ids(check(data)) == [12, 13]
    checked = check(data, evaluation=True)
    assert kept_ids(checked) == [11, 12, 13] and "segmentation" not in checked.dataset["annotations"][0]
    assert "mask AP" in checked.issues[0].action


def objects(*entries):
    """The valid file with annotations of image 1 and class 7 that have these boxes and masks."""
    data = good()
    data["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 7, "bbox": box, "segmentation": mask, "area": 9.0, "iscrowd": 0}
        for n, (box, mask) in enumerate(entries, start=1)
    ]
    return data


@pytest.mark.parametrize(
    ("box", "cause"),
    [
        ([10, 10, 30, 30], "x1, y1, x2, y2"),
        ([10 / WIDTH, 10 / HEIGHT, 20 / WIDTH, 20 / HEIGHT], "fractions"),
        ([20, 20, 20, 20], "center"),
        ([40, 2, 15, 9], "beside their mask"),
        ([10, 10, 0.01, 0.01], "beside their mask"),
    ],
)
def test_a_box_beside_its_mask_is_counted_and_taken_from_the_mask(check, box, cause):
    checked = check(objects((box, [SQUARE]), ([40, 5, 15, 10], [[40, 5, 55, 5, 55, 15, 40, 15]])))
    assert [a["bbox"] for a in checked.dataset["annotations"]] == [[10, 10, 20, 20], [40, 5, 15, 10]]
    (issue,) = checked.issues
    assert "1 of 2 " in issue.reason and cause in issue.reason and "annotation 1" in issue.reason


def test_boxes_without_any_mask_are_one_message(check):
    data = objects(([10, 10, 20, 20], []), ([10, 5, 20, 20], None))
    with pytest.raises(DatasetError, match="MODEL.MASK_ON False"):
        check(data)
    assert kept_ids(check(data, need_masks=False)) == [1, 2] and check(data, need_masks=False).issues == []


@pytest.mark.parametrize("box", [[1, 2, 0, 4], [WIDTH, 0, 5, 5], [1, 2, 3], [1, NAN, 3, 4]])
def test_an_invalid_box_is_that_of_the_mask_if_there_is_a_valid_one(check, box):
    checked = check(objects((box, [SQUARE]), ([1, 2, 3, 4], None), (box, [[1, 2, 3]])), need_masks=False)
    assert [a["bbox"] for a in checked.dataset["annotations"]] == [[10, 10, 20, 20], [1, 2, 3, 4]]
    assert [issue.action for issue in checked.issues] == ["box taken from the mask", "skipped"]


def test_boxes_of_a_hundredth_of_a_pixel_are_counted(check):
    data = objects(*(([10 + n, 10, 0.01, 9], None) for n in range(3)), ([5, 5, 0.5, 0.5], None))
    checked = check(data, need_masks=False)
    assert kept_ids(checked) == [1, 2, 3, 4]
    assert len(checked.issues) == 1 and "3 of 4 have a box of less than 0.1 pixels" in str(checked.issues[0])


def test_boxes_of_rounded_masks_agree(check):
    tiny = [5.2, 5.2, 6.4, 5.2, 6.4, 6.4, 5.2, 6.4]
    assert check(objects(([5, 5, 2, 2], [tiny]), ([9, 9, 24, 24], [SQUARE]))).issues == []


def test_a_missing_box_is_that_of_the_mask(check):
    checked = check(changed("annotations", 0, "bbox", value=None))
    assert checked.dataset["annotations"][0]["bbox"] == [10, 10, 20, 20]
    data = changed("annotations", 0, "bbox", value=None)
    data["annotations"][0]["segmentation"] = [[1, 2, 3]]
    assert kept_ids(check(data)) == [12, 13]


def test_crowds_are_noted_and_can_be_objects(check):
    checked = check(good())
    assert checked.issues == [] and len(checked.notes) == 1
    assert "1 of 3 " in checked.notes[0] and "1 cat" in checked.notes[0] and "--crowds-as-objects" in checked.notes[0]
    checked = check(good(), crowds_as_objects=True)
    assert [a["iscrowd"] for a in checked.dataset["annotations"]] == [0, 0, 0] and checked.notes == []


@pytest.mark.parametrize("area", [0, None])
def test_an_area_of_nothing_is_computed(check, area):
    checked = check(changed("annotations", 0, "area", value=area))
    assert checked.dataset["annotations"][0]["area"] == mask_area([SQUARE], WIDTH, HEIGHT) > 300
    assert len(checked.issues) == 1 and "1 of 3 " in checked.issues[0].reason


def test_the_area_of_a_clipped_mask_is_computed(check):
    checked = check(changed("annotations", 0, "segmentation", value=[[-20, 10, 30, 10, 30, 30, -20, 30]]))
    assert checked.dataset["annotations"][0]["area"] == 600


def test_a_repeated_annotation_is_dropped(check):
    data = good()
    data["annotations"].append({**data["annotations"][0], "id": 20})
    data["annotations"].append({**data["annotations"][0], "id": 21, "category_id": 7})
    checked = check(data)
    assert kept_ids(checked) == [11, 12, 13, 21]
    assert len(checked.issues) == 1 and "1 of 5 repeat" in checked.issues[0].reason


def test_classes_nobody_has_are_noted_and_a_mere_parent_is_dropped(check):
    data = good()
    data["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        *({**category, "supercategory": "pets"} for category in data["categories"]),
    ]
    checked = check(data)
    assert checked.class_names == ["cat", "dog"] and any("'pets'" in note for note in checked.notes)
    data["categories"][1]["supercategory"] = "animal"  # now pets is a class that has no annotation yet
    checked = check(data)
    assert checked.class_names == ["pets", "cat", "dog"] and any("1 of 3 classes" in note for note in checked.notes)


def test_a_class_that_is_its_own_parent_is_kept(check):
    data = good()
    data["categories"] = [
        {"id": 0, "name": "cat", "supercategory": "cat"},
        {"id": 7, "name": "lynx", "supercategory": "cat"},
    ]
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 7]
    assert check(data).class_names == ["cat", "lynx"]


def test_a_dropped_polygon_does_not_change_the_box(check):
    mask = [[10, 10, 18, 10, 18, 18, 10, 18], [20, 20, 30, 20, 30, 30, 20]]
    checked = check(changed("annotations", 0, "segmentation", value=mask))
    assert checked.dataset["annotations"][0]["bbox"] == [10, 10, 20, 20]
    assert len(checked.issues) == 1 and "7 numbers" in checked.issues[0].reason


def test_the_area_of_an_object_without_a_mask_is_kept(check):
    data = changed("annotations", 0, "segmentation", value=[])
    assert check(data, evaluation=True).dataset["annotations"][0]["area"] == 400


def test_more_than_100_objects_in_an_image_are_noted(check):
    boxes = [[x / 4, 10, 3, 4] for x in range(150)]
    checked = check(objects(*((box, None) for box in boxes)), need_masks=False)
    assert [note for note in checked.notes if "150" in note and "TEST.DETECTIONS_PER_IMAGE" in note]


def test_a_polygon_without_area_is_no_mask(check):
    checked = check(changed("annotations", 0, "segmentation", value=[[10, 10, 20, 10, 30, 10]]))
    assert kept_ids(checked) == [12, 13] and "no area" in checked.issues[0].reason


# Change of the valid file, pattern of its only issue, and the annotations that are left.
SINGLE_ISSUES = {
    "annotation is a list": (("annotations", 0), [], "annotation at index 0", [12, 13]),
    "unknown category": (("annotations", 0, "category_id"), 8, "annotation 11: category_id=8", [12, 13]),
    "unknown image": (("annotations", 0, "image_id"), 3, "annotation 11: image_id=3", [12, 13]),
    "text image id": (("annotations", 0, "image_id"), "one", "image_id='one'", [12, 13]),
    "bool category id": (("annotations", 0, "category_id"), True, "category_id=True", [12, 13]),
    "box of three": (("annotations", 0, "bbox"), [1, 2, 3], r"bbox=\[1, 2, 3\]", [11, 12, 13]),
    "box missing": (("annotations", 0, "bbox"), None, "1 of 3 have no bbox", [11, 12, 13]),
    "box with NaN": (("annotations", 0, "bbox"), [1, NAN, 3, 4], "bbox=", [11, 12, 13]),
    "box with infinity": (("annotations", 0, "bbox"), [1, 2, INF, 4], "bbox=", [11, 12, 13]),
    "box with text": (("annotations", 0, "bbox"), [1, 2, "3 px", 4], "bbox=", [11, 12, 13]),
    "box with huge integer": (("annotations", 0, "bbox"), [1, 2, 10**400, 4], "bbox=", [11, 12, 13]),
    "box without width": (
        ("annotations", 0, "bbox"),
        [1, 2, 0, 4],
        "bbox.*0 x 4; box taken from the mask",
        [11, 12, 13],
    ),
    "box of negative height": (("annotations", 0, "bbox"), [1, 2, 3, -4], "bbox.*3 x -4", [11, 12, 13]),
    "box outside": (("annotations", 0, "bbox"), [WIDTH, 0, 5, 5], "bbox.* 60 x 40; box taken", [11, 12, 13]),
    "box partly outside": (("annotations", 0, "bbox"), [-5, 10, 35, 20], "; clipped", [11, 12, 13]),
    "mask missing": (("annotations", 0, "segmentation"), None, "segmentation is missing", [12, 13]),
    "mask empty": (("annotations", 0, "segmentation"), [], "segmentation is missing", [12, 13]),
    "mask flat": (("annotations", 0, "segmentation"), SQUARE, "1 of 3 .*list.*annotation 11; converted", [11, 12, 13]),
    "polygon of four numbers": (("annotations", 0, "segmentation"), [[1, 1, 5, 5]], "4 numbers", [12, 13]),
    "polygon of seven numbers": (
        ("annotations", 0, "segmentation"),
        [[1, 1, 5, 5, 9, 1, 2]],
        "7 numbers",
        [12, 13],
    ),
    "polygon with NaN": (("annotations", 0, "segmentation"), [[NAN, *SQUARE[1:]]], "polygon.*nan", [12, 13]),
    "polygon with huge number": (
        ("annotations", 0, "segmentation"),
        [[1e30, *SQUARE[1:]]],
        "polygon.*1e.30",
        [12, 13],
    ),
    "polygon outside": (
        ("annotations", 0, "segmentation"),
        [[70, 1, 90, 1, 80, 9]],
        "polygon 1 of 1 .*60 x 40",
        [12, 13],
    ),
    "polygon partly outside": (
        ("annotations", 0, "segmentation"),
        [[-20, 10, 30, 10, 30, 30, -20, 30]],
        "20 pixels .*clipped",
        [11, 12, 13],
    ),
    "one polygon of two": (
        ("annotations", 0, "segmentation"),
        [SQUARE, [1, 2]],
        "polygon 2 of 2 .*2 numbers.*others kept",
        [11, 12, 13],
    ),
    "RLE of other size": (("annotations", 1, "segmentation", "size"), [3, 4], r"RLE size=\[3, 4\]", [11, 13]),
    "RLE rotated": (("annotations", 1, "segmentation", "size"), [WIDTH, HEIGHT], "RLE size", [11, 13]),
    "RLE without counts": (("annotations", 1, "segmentation", "counts"), None, "RLE counts=None", [11, 13]),
    "RLE of foreign letters": (("annotations", 1, "segmentation", "counts"), "\n é", "RLE counts", [11, 13]),
    "RLE cut short": (("annotations", 1, "segmentation", "counts"), "oooo", "RLE counts", [11, 13]),
    "RLE of endless letters": (("annotations", 1, "segmentation", "counts"), "o" * 99, "RLE counts", [11, 13]),
    "RLE of too few pixels": (("annotations", 1, "segmentation", "counts"), "55", "10 pixels.* 2400", [11, 13]),
    "RLE of negative run": (("annotations", 2, "segmentation", "counts"), [2401, -1], "RLE counts", [11, 12]),
    "RLE of too many pixels": (("annotations", 2, "segmentation", "counts"), [2400, 1], "2401 pixels", [11, 12]),
    "RLE of nothing": (("annotations", 2, "segmentation", "counts"), [2400], "RLE", [11, 12]),
    "iscrowd of two": (("annotations", 0, "iscrowd"), 2, "iscrowd=2", [12, 13]),
    "ignore": (("annotations", 0, "ignore"), 1, "ignore=1.*crowd", [11, 12, 13]),
    "area of NaN": (("annotations", 0, "area"), NAN, "area=nan.*computed", [11, 12, 13]),
    "taken annotation id": (
        ("annotations", 2, "id"),
        11,
        "annotation 11 of image 2: .*kept as annotation 13",
        [11, 12, 13],
    ),
    "annotation id of zero": (
        ("annotations", 0, "id"),
        0,
        "1 of 3 .* annotation 0 of image 1; renumbered",
        [14, 12, 13],
    ),
    "text annotation id": (("annotations", 0, "id"), "11", "1 of 3 .* annotation '11'; converted", [11, 12, 13]),
    "uuid of an annotation": (("annotations", 0, "id"), "a-b", "1 of 3 .* 'a-b' of image 1; renumbered", [14, 12, 13]),
    "no annotation id": (("annotations", 0, "id"), None, "1 of 3 have no id", [14, 12, 13]),
    "image without file": (
        ("images", 1, "file_name"),
        "no.png",
        "image 2: 'no.png' .*skipped with its 1 annotations",
        [11, 12],
    ),
    "image of no name": (("images", 1, "file_name"), "", "file_name=''", [11, 12]),
    "image of wrong width": (("images", 1, "width"), 61, "width=61, height=40.*'2.png' is 60 x 40", [11, 12]),
    "image of negative height": (("images", 1, "height"), -40, "width=60, height=-40", [11, 12]),
    "image of half a pixel": (("images", 1, "height"), 40.5, "width=60, height=40.5", [11, 12]),
    "image of text height": (("images", 1, "height"), "forty", "height='forty'", [11, 12]),
    "taken image id": (
        ("images",),
        [*good()["images"], good()["images"][0]],
        "1 of 3 repeat an earlier image, the first is image 1; dropped",
        [11, 12, 13],
    ),
    "taken category id": (
        ("categories",),
        [*good()["categories"], {"id": 7, "name": "cow"}],
        "'cow' .*'cat'",
        [11, 12, 13],
    ),
    "category without name": (
        ("categories",),
        [*good()["categories"], {"id": 8}],
        "category 8: name=None",
        [11, 12, 13],
    ),
    "info with NaN": (("info",), {"x": NAN}, "info: .*NaN", [11, 12, 13]),
}


@pytest.mark.parametrize("name", SINGLE_ISSUES)
def test_single_issue(name, check, tmp_path):
    path, value, pattern, left = SINGLE_ISSUES[name]
    checked = check(changed(*path, value=value))
    assert len(checked.issues) == 1
    line = str(checked.issues[0])
    assert line.startswith("a.json: ") and "\n" not in line and re.search(pattern, line)
    assert kept_ids(checked) == left
    # What is left is strict JSON, clean by the same rules, and safe for pycocotools.
    checked.save(tmp_path / "clean.json")
    assert validate_coco(tmp_path / "clean.json", tmp_path / "images").issues == []
    coco = COCO(str(tmp_path / "clean.json"))
    assert all(coco.annToMask(annotation).sum() > 0 for annotation in coco.anns.values())


def test_clipping_keeps_what_is_inside(check):
    triangle = [50, 10, 70, 10, 50, 30]  # its edge from (70, 10) to (50, 30) meets the image's right side at (60, 20)
    data = changed("annotations", 0, "segmentation", value=[triangle])
    data["annotations"][0]["bbox"] = [50, 10, 20, 20]
    del data["annotations"][0]["area"]
    annotation = check(data).dataset["annotations"][0]
    assert annotation["bbox"] == [50, 10, 10, 20]
    points = {tuple(point) for point in np.reshape(annotation["segmentation"][0], (-1, 2)).tolist()}
    assert points == {(50, 10), (60, 10), (60, 20), (50, 30)}
    assert annotation["area"] == pytest.approx(150, abs=12)


def test_area_of_compressed_rle_is_that_of_pycocotools(check):
    rng = np.random.default_rng(0)
    data = good()
    areas = []
    for number in range(30):
        mask = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < rng.choice([0.001, 0.05, 0.5, 0.97]), np.uint8)
        mask[0, 0] = number % 2  # a mask that starts with its first pixel has an empty first run
        mask[-1, -1] = 1
        areas.append(int(mask.sum()))
        segmentation = {"size": [HEIGHT, WIDTH], "counts": mask_util.encode(mask)["counts"].decode()}
        box = {"image_id": 1, "category_id": 7, "bbox": mask_util.toBbox(mask_util.encode(mask)).tolist()}
        data["annotations"].append({"id": 100 + number, "segmentation": segmentation, **box})
    checked = check(data)
    assert len(checked.issues) == 2  # no area, no iscrowd
    assert [a["area"] for a in checked.dataset["annotations"][3:]] == areas


def test_two_categories_of_one_name_are_kept_apart(check):
    checked = check(changed("categories", 0, "name", value="cat"))
    assert checked.class_names == ["cat", "cat"] and "2 have the name 'cat'" in str(checked.issues[0])


def test_rounding_beyond_the_border_is_valid(check):
    data = changed("annotations", 0, "bbox", value=[-0.5, 0, 61, 40.4])
    data["annotations"][0]["segmentation"] = [[-0.5, 0, 60.9, 0, 60.9, 40.9]]
    assert check(data).issues == []


def test_missing_area_and_iscrowd_are_filled_in(check):
    data = good()
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    checked = check(data)
    assert [issue.reason for issue in checked.issues] == [
        "3 of 3 have no area, the first is annotation 11",
        "3 of 3 have no iscrowd, the first is annotation 11",
    ]
    assert [a["area"] for a in checked.dataset["annotations"]] == [400, 15 * 26 - 40, 15 * 26 - 40]
    assert [a["iscrowd"] for a in checked.dataset["annotations"]] == [0, 0, 0]


def test_without_need_masks_the_box_is_kept(check):
    checked = check(changed("annotations", 0, "segmentation", value=[[1, 1, 5, 5]]), need_masks=False)
    assert kept_ids(checked) == [11, 12, 13] and "segmentation" not in checked.dataset["annotations"][0]
    assert checked.issues[0].action == "mask dropped, box kept"
    assert check(changed("annotations", 0, "segmentation", drop=True), need_masks=False).issues == []


def test_crowds_alone_are_an_issue_and_an_error_for_training(check):
    data = good()
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1
    assert "all 3 are crowds" in str(check(data).issues[0])
    with pytest.raises(DatasetError, match="of its 3 annotations"):
        check(data, require_annotations=True)


@pytest.mark.parametrize("data", [changed("annotations", value=[]), changed("annotations", drop=True)])
def test_no_annotations(check, data):
    checked = check(data)
    assert len(checked.issues) == 1 and len(checked.dataset["images"]) == 2
    with pytest.raises(DatasetError, match="none of its 0 annotations"):
        check(data, require_annotations=True)


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (json.dumps(good()).encode()[:200], "JSON.*line 1"),
        (b'{"images": [}', "line 1, column 13"),
        (b"\xff\xfe{", "UTF-8"),
        (b"[" * 200_000, "parsed"),
        (b'{"images": ' + b"9" * 5000 + b"}", "parsed"),
        (b"[]", "expected"),
        (changed("images", drop=True), "'images' is missing"),
        (changed("images", value=[]), r"images=\[\]"),
        (changed("categories", drop=True), "'categories' is missing"),
        (changed("categories", value={}), "categories={}"),
        (changed("categories", value=[{"id": 1}]), "1 categories"),
        (changed("annotations", value="x"), "annotations='x'"),
    ],
)
def test_unusable_file_is_a_one_line_error_with_its_name(check, data, pattern):
    with pytest.raises(DatasetError, match=pattern) as caught:
        check(data)
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_unusable_paths(tmp_path, images):
    with pytest.raises(DatasetError, match="none.json"):
        validate_coco(tmp_path / "none.json", images)
    with pytest.raises(DatasetError, match="is a folder"):
        validate_coco(tmp_path, images)
    (tmp_path / "a.json").write_text(json.dumps(good()))
    with pytest.raises(DatasetError, match="none is not a folder"):
        validate_coco(tmp_path / "a.json", tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(DatasetError, match=r"other .*'1\.png'"):
        validate_coco(tmp_path / "a.json", tmp_path / "other")


def test_broken_and_rotated_image_files(check, images):
    (images / "2.png").write_bytes(b"<html>")
    assert "2.png" in str(check(good()).issues[0])
    rotated = Image.Exif()
    rotated[0x0112] = 6  # Detectron2 turns the picture on reading it
    Image.new("RGB", (HEIGHT, WIDTH)).save(images / "2.png", format="JPEG", exif=rotated)
    assert check(good()).issues == []


def test_many_issues_are_fast(check):
    data = good()
    first = data["annotations"][0]
    for number in range(10_000):
        data["annotations"].append({**first, "id": 11, "bbox": [-50, 0, 5, 5], "segmentation": [[1]]})
        data["annotations"].append({**first, "id": 11, "bbox": [10, 10, 20, 20 - number / 1e6 - 1e-6]})
    checked = check(data)
    assert len(checked.issues) == 20_000 and len(set(kept_ids(checked))) == 10_003


def test_save_does_not_overwrite_its_input_and_reports_write_errors(check, tmp_path):
    checked = check(good())
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(DatasetError, match="a.json"):
        checked.save(tmp_path / "images" / ".." / "a.json")
    with pytest.raises(DatasetError, match="clean.json"):
        checked.save(tmp_path / "a.json" / "clean.json")
    checked.save(tmp_path / "new" / "clean.json")
    assert (tmp_path / "a.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clean.json"]


def test_registered_dataset_loads_with_the_same_classes(check, tmp_path, images):
    name = "halodet_test_checked"
    checked = check(good())
    try:
        register_validated(name, checked, tmp_path / "clean.json")
        assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]
        records = DatasetCatalog.get(name)
        assert [[a["category_id"] for a in record["annotations"]] for record in records] == [[1, 0], [0]]
        register_validated(name, checked, tmp_path / "clean.json")
        with pytest.raises(DatasetError, match=name):
            register_validated(name, checked, tmp_path / "elsewhere.json")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_classes_are_matched_by_name(check):
    train = check(good()).dataset["categories"]  # cat 7, dog 90
    same_order = changed("categories", value=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}])
    for annotation in same_order["annotations"]:
        annotation["category_id"] = {7: 1, 90: 2}[annotation["category_id"]]
    checked = check(same_order)
    assert match_categories(checked, train, "train.json") is checked, "its own ids stay in the predictions"

    other_order = changed(
        "categories", value=[{"id": 1, "name": "dog", "keypoints": ["nose"]}, {"id": 2, "name": "cat"}]
    )
    for annotation in other_order["annotations"]:
        annotation["category_id"] = {7: 2, 90: 1}[annotation["category_id"]]
    matched = match_categories(check(other_order), train, "train.json")
    assert matched.class_names == ["cat", "dog"] and any("train.json" in note for note in matched.notes)
    assert [category["id"] for category in matched.dataset["categories"]] == [7, 90]
    assert [a["category_id"] for a in matched.dataset["annotations"]] == [90, 7, 7]
    assert matched.keypoint_names == ["nose"]

    subset = changed("categories", value=[{"id": 5, "name": "dog"}])
    subset["annotations"] = [{**good()["annotations"][0], "category_id": 5}]
    matched = match_categories(check(subset), train, "train.json")
    assert matched.class_names == ["cat", "dog"]
    assert [a["category_id"] for a in matched.dataset["annotations"]] == [90]

    with pytest.raises(DatasetError, match=r"train.json does not have: \['cow'\]"):
        match_categories(check(changed("categories", 1, "name", value="cow")), train, "train.json")
    twice = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "dog"}]
    with pytest.raises(DatasetError, match="same name"):
        match_categories(check(good()), twice, "train.json")


def test_a_parent_that_validation_data_has_is_restored(check):
    train = good()
    parent = {"id": 0, "name": "pets", "supercategory": "none"}
    train["categories"] = [parent, *({**category, "supercategory": "pets"} for category in train["categories"])]
    val = copy.deepcopy(train)
    val["annotations"][0]["category_id"] = 0
    checked = check(train)
    restored = restore_parent(checked, check(val))
    assert checked.class_names == ["cat", "dog"] and restored.class_names == ["pets", "cat", "dog"]
    assert restore_parent(checked, checked) is checked
    assert restored.dataset["annotations"] == checked.dataset["annotations"]


def test_records_in_memory_are_those_that_detectron2_reads(check, tmp_path, images):
    data = good()
    data["images"].reverse()
    data["categories"][0]["keypoints"] = ["left ear", "right ear"]
    data["annotations"][0]["keypoints"] = [1, 2, 2, 0, 0, 0]
    data["annotations"].append({**data["annotations"][0], "id": 9, "segmentation": None, "bbox": [1, 2, 3, 4]})
    name = "halodet_test_records"
    try:
        register_validated(name, check(data, evaluation=True), tmp_path / "clean.json")
        first, second = DatasetCatalog.get(name), DatasetCatalog.get(name)
        assert first == second == load_coco_json(str(tmp_path / "clean.json"), str(images), name)
        assert sum(len(record["annotations"]) for record in first) == 4
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 90: 1}
        assert metadata.keypoint_flip_map == [("left ear", "right ear")]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_valid_file_is_copied_and_any_other_is_written(check, tmp_path):
    data = good()
    data["annotations"] = [{**data["annotations"][0], "comment": "kept by a copy only"}]
    data["categories"][0]["supercategory"] = "animal"
    checked = check(data, need_masks=False)
    checked.save(tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == data
    for content in (
        json.dumps(data, ensure_ascii=False).replace("dog", "café").encode(),
        json.dumps(data).encode("utf-8-sig"),
        json.dumps({**data, "annotations": data["annotations"] * 2}).encode(),
        json.dumps({key: value for key, value in data.items() if key != "info"}).encode(),
    ):
        checked = check(content)
        checked.save(tmp_path / "written.json")
        written = (tmp_path / "written.json").read_bytes()
        assert written.isascii() and json.loads(written) == checked.dataset and b"comment" not in written


def test_command_line(check, tmp_path, images, capsys):
    tool = load_tool("check_dataset")
    path = tmp_path / "a.json"
    arguments = ["--json", str(path), "--images", str(images)]
    path.write_text(json.dumps(good()))
    assert tool.main(arguments) == 0
    data = good()
    data["annotations"] += [{**data["annotations"][0], "id": 100 + n, "segmentation": []} for n in range(250)]
    path.write_text(json.dumps(data))
    capsys.readouterr()
    assert tool.main(arguments) == 1
    *lines, note, summary = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ") and "1 of 3 annotations are crowds" in note
    lines.append(summary)
    assert (
        len(lines) == 202
        and lines[200] == "... and 50 more issues"
        and "3 annotations" in lines[201]
        and "250 issues" in lines[201]
    )
    path.write_text("{")
    assert tool.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1


DATASETS = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
BAD_INPUTS = DATASETS / "bad_inputs" / "annotations"
REAL = {  # file: what its only fault or its refusal pattern, None for a clean file
    "00_ok_base": None,
    "01_all_compressed_rle": None,
    "03_empty_segmentation_list": "annotation 1158531: segmentation is missing",
    "05_polygon_4_numbers": "annotation 1158531: polygon 1 of 1 has 4 numbers",
    "07_zero_area_bbox": "annotation 1158531: bbox=[10, 10, 0, 0]",
    "09_bbox_outside_image": "annotation 1158531: bbox=[5000, 5000, 10, 10]",
    "10_unknown_category_id": "annotation 1158531: category_id=999",
    "11_orphan_image_id": "annotation 1158531: image_id=123456789",
    "14_missing_image_file": "image 5001: 'does_not_exist.jpg'",
    "16_no_annotations_at_all": "annotations: none of 0",
    "18_no_categories": "'categories'",
    "19_nan_coordinates": "annotation 1158531: polygon 1 of 1 contains nan",
    "21_all_crowd": "all 51 are crowds",
    "23_no_area_key": "51 of 51 have no area",
    "24_descending_gappy_category_ids": None,
    "26_rle_size_mismatch": "annotation 1158531: RLE size=[3, 4]",
    "28_truncated": "JSON",
    "30_empty_file": "is empty",
}


@pytest.mark.skipif(
    not BAD_INPUTS.is_dir(), reason=f"no folder {BAD_INPUTS}; set DETECTRON2_DATASETS to one with bad_inputs"
)
@pytest.mark.parametrize("name", REAL)
def test_real_single_issue_files(name):
    pattern = REAL[name]
    try:
        lines = [
            str(issue) for issue in validate_coco(BAD_INPUTS / f"{name}.json", DATASETS / "coco" / "val2017").issues
        ]
    except DatasetError as error:
        assert name in ("18_no_categories", "28_truncated", "30_empty_file")
        lines = [str(error)]
    assert len(lines) == (pattern is not None)
    assert pattern is None or pattern in lines[0]
