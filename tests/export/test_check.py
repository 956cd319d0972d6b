"""Pairing and differences of detections, on detections made by hand."""

from halodet.export.check import TOLERANCES, box_iou, compare_outputs, match
from halodet.inference.detections import Detections

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou as torch_box_iou

SIZE = (20, 30)


def detections(boxes, scores, classes, masks=None):
    boxes, scores, classes = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(classes)
    return Detections(image_size=SIZE, boxes=boxes, scores=scores, classes=classes.astype(np.int64), masks=masks)


A = detections([[0, 0, 10, 10], [5, 5, 15, 18], [0, 0, 10, 10]], [0.9, 0.8, 0.3], [1, 1, 2])


def test_overlap_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.rand(7, 2, 2, generator=generator).sort(1).values.flatten(1) for _ in range(2)]
    np.testing.assert_allclose(box_iou(*(b.numpy() for b in boxes)), torch_box_iou(*boxes), rtol=1e-5)
    flat = np.zeros((1, 4))
    assert box_iou(flat, flat) == 0


def test_pairs_have_equal_class_whatever_the_order():
    assert sorted(match(A, A[np.array([2, 0, 1])])) == [(0, 1), (1, 2), (2, 0)]
    assert match(A, detections([[0, 0, 10, 10]], [0.9], [3])) == []
    empty = detections([], [], [])
    assert match(A, empty) == match(empty, A) == []


def compare(found, **options):
    return compare_outputs({"instances": A}, {"instances": found}, SIZE, **options)


def test_differences():
    same = compare(A)
    assert (same.expected, same.found, same.matched, same.score, same.box) == (3, 3, 3, 0, 0)
    assert same.usable and same.agrees(TOLERANCES["float32"])
    moved = compare(detections(A.boxes + [[0, 0, 0.5, 0]] * 3, A.scores - np.float32(0.01), A.classes))
    assert moved.matched == 3
    assert moved.box == pytest.approx(0.5) and moved.score == pytest.approx(0.01, rel=1e-4)
    assert not moved.agrees(TOLERANCES["float32"]) and moved.agrees(TOLERANCES["float16"])
    missing = compare(A[np.array([0, 2])])
    assert (missing.expected, missing.found, missing.matched) == (3, 2, 2)
    assert not missing.agrees(TOLERANCES["float32"])
    assert not missing.agrees(TOLERANCES["int8"])
    # The one at the score threshold may be below it in the file; others may not, however low they are.
    assert compare(A[np.array([0, 1])], threshold=0.295, margin=0.01).agrees(TOLERANCES["float32"])
    assert not compare(A[np.array([0, 1])], threshold=0.05, margin=0.01).agrees(TOLERANCES["float32"])


@pytest.mark.parametrize("precision", list(TOLERANCES))
def test_a_file_that_finds_nothing_or_something_else_disagrees(precision):
    one, empty = detections([[0, 0, 10, 10]], [0.99], [1]), detections([], [], [])
    for a, b in ((one, empty), (empty, one), (A, empty)):
        found = compare_outputs({"instances": a}, {"instances": b}, SIZE, threshold=0.05, margin=0.1)
        assert found.unmatched == max(len(a), len(b)) and not found.agrees(TOLERANCES[precision])


def test_detections_after_the_last_one_that_fits():
    """The file returns three, so that of the model's fourth nothing is known."""
    found = A[np.array([0, 1, 2])]
    more = detections([*A.boxes, [1, 1, 9, 19]], [*A.scores, 0.25], [1, 1, 2, 0])
    compared = compare_outputs({"instances": more}, {"instances": found}, SIZE, threshold=0.05, limit=3)
    assert compared.unmatched == 0 and compared.agrees(TOLERANCES["float32"])
    compared = compare_outputs({"instances": more}, {"instances": found}, SIZE, threshold=0.05, limit=4)
    assert compared.unmatched == 1 and not compared.agrees(TOLERANCES["float32"])


def test_masks_of_int8_count_on_average():
    masks = np.zeros((3, *SIZE), bool)
    masks[:, 2:6, 2:6] = True
    expected = detections(A.boxes, A.scores, A.classes, masks)
    one, all_wrong = masks.copy(), ~masks
    one[1] = False
    for found, agrees in ((one, True), (all_wrong, False)):
        compared = compare_outputs(
            {"instances": expected}, {"instances": detections(A.boxes, A.scores, A.classes, found)}, SIZE
        )
        assert compared.mask == 1 and compared.agrees(TOLERANCES["int8"]) == agrees
        assert not compared.agrees(TOLERANCES["float16"])


def test_masks():
    masks = np.zeros((3, *SIZE), bool)
    masks[:, 2:6, 2:6] = True
    other = masks.copy()
    other[1, 5] = False  # 4 of 16 pixels
    expected = detections(A.boxes, A.scores, A.classes, masks)
    found = detections(A.boxes, A.scores, A.classes, other)
    assert compare_outputs({"instances": expected}, {"instances": found}, SIZE).mask == pytest.approx(0.25)


def test_segments_are_compared_by_class():
    segments = np.array([[1, 1, 2, 0]])
    infos = [{"id": 1, "category_id": 4, "isthing": True}, {"id": 2, "category_id": 4, "isthing": False}]
    renamed = [{**infos[0], "id": 2}, {**infos[1], "id": 1}]
    expected = {"instances": A, "panoptic_seg": (segments, infos)}
    assert (
        compare_outputs(expected, {"instances": A, "panoptic_seg": (segments[:, [2, 2, 0, 3]], renamed)}, SIZE).pixels
        == 0
    )
    assert compare_outputs(expected, {"instances": A, "panoptic_seg": (segments, renamed)}, SIZE).pixels == 0.75


def test_boxes_without_an_area_are_not_usable():
    flat = detections([[3, 3, 3, 9]], [0.9], [0])
    assert not compare_outputs({"instances": flat}, {"instances": flat}, SIZE).usable
    empty = detections([], [], [])
    assert not compare_outputs({"instances": empty}, {"instances": empty}, SIZE).usable
