"""Boxes that are written in another form than COCO's are recognized from the whole file."""

import json

from halodet.data import validate_coco
from halodet.data.box_format import BOX_FORMATS, are_fractions, find_box_format
from halodet.errors import DatasetError

import numpy as np
import pytest
from PIL import Image

WIDTH, HEIGHT = 200, 151
WRITE = {
    "x1, y1, x2, y2": lambda x, y, w, h: [x, y, x + w, y + h],
    "fractions of the image": lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT],
    "their center and size": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "center and size in fractions of the image": lambda x, y, w, h: [
        (x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT
    ],
    "x1, y1, x2, y2 in fractions of the image": lambda x, y, w, h: [
        x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT
    ],
}  # fmt: skip


def random_boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        w, h = rng.integers(12, 90, 2).tolist()
        yield int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h)), w, h


@pytest.fixture
def check(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.png")

    def run(boxes, masks, **options):
        annotations = [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 9, "iscrowd": 0, "segmentation": mask}
            for n, (box, mask) in enumerate(zip(boxes, masks, strict=True), start=1)
        ]
        images = [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}]
        data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / "a.json").write_text(json.dumps(data))
        return validate_coco(tmp_path / "a.json", tmp_path, **options)

    return run


def outline(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.mark.parametrize("form", BOX_FORMATS, ids=lambda form: form.name)
def test_all_boxes_of_a_file_are_converted_with_masks_or_without(check, form):
    boxes = list(random_boxes(40))
    written = [WRITE[form.name](*box) for box in boxes]
    checked = check(written, [*map(outline, *zip(*boxes[:30], strict=True)), *[[]] * 10], need_masks=False)
    found = [annotation["bbox"] for annotation in checked.dataset["annotations"]]
    assert np.allclose(found, boxes) and len(checked.issues) == 1
    assert "40 of 40" in str(checked.issues[0]) and form.name in str(checked.issues[0])


@pytest.mark.parametrize("form", [BOX_FORMATS[0], BOX_FORMATS[1], BOX_FORMATS[4]], ids=lambda form: form.name)
def test_boxes_alone_show_their_form_if_they_cannot_be_coco(check, form):
    boxes = list(random_boxes(40))
    checked = check([WRITE[form.name](*box) for box in boxes], [[]] * 40, need_masks=False)
    assert np.allclose([annotation["bbox"] for annotation in checked.dataset["annotations"]], boxes)
    assert len(checked.issues) == 1 and f"40 of 40 have a box that is written as {form.name}" in str(checked.issues[0])


def test_large_boxes_that_leave_the_image_by_a_little_stay(check):
    """Of large objects, width and height are larger than x and y, so that they are corners of some box too."""
    boxes = [[20 + n, 15, WIDTH - 20 - n + 6 * (n % 2), HEIGHT - 20] for n in range(40)]
    found = [a["bbox"] for a in check(boxes, [[]] * 40, need_masks=False).dataset["annotations"]]
    assert found == [[x, y, min(w, WIDTH - x), h] for x, y, w, h in boxes]


def test_fractions_of_an_unknown_form_are_refused(check):
    """Boxes in the middle of the image are inside it from their corner and from their center."""
    boxes = [[0.4 + n / 100, 0.4, 0.2, 0.2] for n in range(10)]
    with pytest.raises(DatasetError, match="fractions of the image.*center and size"):
        check(boxes, [[]] * 10, need_masks=False)


def test_a_rounded_fraction_beyond_the_border_decides_nothing(check):
    boxes = [[0.3334, 0.1, 0.6667, 0.2], *([0.6 - 0.05 * n, 0.01, 0.4, 0.6] for n in range(12))]
    found = [a["bbox"] for a in check(boxes, [[]] * 13, need_masks=False).dataset["annotations"]]
    assert np.allclose(found[1:], np.array(boxes[1:]) * ([WIDTH, HEIGHT] * 2))


def test_right_boxes_stay(check):
    boxes = list(map(list, random_boxes(40)))
    for masks in ([outline(*box) for box in boxes], [[]] * 40):
        checked = check(boxes, masks, need_masks=False)
        assert checked.issues == [] and [a["bbox"] for a in checked.dataset["annotations"]] == boxes


def test_a_few_wrong_boxes_do_not_convert_the_others(check):
    boxes = list(map(list, random_boxes(40)))
    written = [WRITE["x1, y1, x2, y2"](*box) for box in boxes[:6]] + boxes[6:]
    checked = check(written, [outline(*box) for box in boxes])
    found = np.array([annotation["bbox"] for annotation in checked.dataset["annotations"]])
    assert (found[6:] == boxes[6:]).all()
    overlap = np.minimum(found[:, :2] + found[:, 2:], np.add(boxes, 0)[:, :2] + np.array(boxes)[:, 2:]) - found[:, :2]
    assert (overlap.prod(1) >= 0.5 * np.array(boxes)[:, 2:].prod(1)).all()


def test_masks_in_fractions_are_converted_with_their_boxes(check):
    boxes = list(random_boxes(20))
    scale = np.tile([WIDTH, HEIGHT], 4)
    masks = [[(np.array(outline(*box)[0]) / scale).tolist()] for box in boxes]
    checked = check([WRITE["fractions of the image"](*box) for box in boxes], masks)
    assert np.allclose([a["bbox"] for a in checked.dataset["annotations"]], boxes)
    assert np.allclose([a["segmentation"][0] for a in checked.dataset["annotations"]], [outline(*b)[0] for b in boxes])
    assert len(checked.issues) == 2 and all("20 of 20" in str(issue) for issue in checked.issues)


def test_keypoints_are_converted_with_boxes_in_fractions(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.png")
    annotations = []
    for number, (x, y, w, h) in enumerate(random_boxes(30), start=1):
        box, point = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT], [(x + 2) / WIDTH, (y + 1) / HEIGHT, 2]
        annotations.append({"id": number, "image_id": 1, "category_id": 1, "bbox": box, "keypoints": point, "area": 9})
    images = [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}]
    categories = [{"id": 1, "name": "cat", "keypoints": ["nose"]}]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    found = validate_coco(tmp_path / "a.json", tmp_path, need_masks=False).dataset["annotations"]
    assert len(found) == 30
    assert np.allclose([np.subtract(a["keypoints"][:2], a["bbox"][:2]) for a in found], [2, 1])


def test_tiny_images_and_few_boxes_decide_nothing():
    assert find_box_format([([0, 0, 1, 1], None, 4, 4)] * 9) is None
    assert find_box_format([([0.1, 0.1, 0.5, 0.5], None, 400, 400)] * 3) is None
    assert not are_fractions([([0, 0, 1, 1], [0, 0, 1, 1], 4, 4)])
    assert find_box_format([]) is None and not are_fractions([])
