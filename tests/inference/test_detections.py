"""Detections, their conversion from Instances, and COCO results compared with Detectron2 and pycocotools."""

import json

from halodet.inference.detections import Detections, encode_mask, to_coco

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances


def random_instances(count, masks=True, keypoints=True):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * 20], dim=1)
    found = Instances((30, 40), pred_boxes=Boxes(boxes), scores=torch.rand(count, generator=generator))
    found.pred_classes = torch.randint(0, 3, (count,), generator=generator)
    if masks:
        found.pred_masks = torch.rand(count, 30, 40, generator=generator) > 0.5
    if keypoints:
        found.pred_keypoints = torch.rand(count, 5, 3, generator=generator) * 20
    return found


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (37, 53), (480, 640)])
@pytest.mark.parametrize("share", [0.0, 1.0, 0.5, 0.01, 0.999, "blocks"])
def test_rle_equals_pycocotools_bit_for_bit(size, share):
    rng = np.random.default_rng(0)
    for _ in range(3):
        if share == "blocks":  # long runs, whose numbers need several letters
            mask = np.kron(rng.random((2, 2)) > 0.5, np.ones(size, bool))
        else:
            mask = rng.random(size) < share
        expected = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        found = encode_mask(mask)
        assert found == {"size": list(mask.shape), "counts": expected["counts"].decode()}
        assert mask_util.area(found) == mask.sum()


def test_rle_of_a_large_mask():
    mask = np.zeros((3000, 4000), bool)
    mask[5:2990, 7:3990] = True
    assert encode_mask(mask)["counts"].encode() == mask_util.encode(np.asfortranarray(mask, np.uint8))["counts"]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("keypoints", [False, True])
@pytest.mark.parametrize("count", [0, 6])
def test_results_equal_detectron2s(count, keypoints, masks):
    found = random_instances(count, masks, keypoints)
    results = to_coco(found, 7, [10, 20, 30])
    assert results == to_coco(Detections.from_instances(found), 7, [10, 20, 30])
    assert results == to_coco(found, 7, [10, 20, 30])  # the instances are unchanged
    expected = instances_to_coco_json(found, 7)  # changes the keypoints
    for result in expected:
        result["category_id"] = [10, 20, 30][result["category_id"]]
    assert json.dumps(results) == json.dumps(expected)  # also the order of the fields


def test_indexing_selects_in_all_fields():
    found = Detections.from_instances(random_instances(6))
    scores = found.scores
    cases = [
        (slice(1, 4), [1, 2, 3]),
        (np.array([4, 0]), [4, 0]),
        (scores > 0.5, np.flatnonzero(scores > 0.5)),
        ([2], [2]),
        (torch.tensor([True] * 5 + [False]), range(5)),
        ([], np.zeros(0, int)),
    ]
    for item, index in cases:
        part = found[item]
        assert len(part) == len(index) and part.image_size == (30, 40)
        for name in ("boxes", "scores", "classes", "masks", "keypoints"):
            assert np.array_equal(getattr(part, name), getattr(found, name)[np.array(index)])
    assert len(found[:0][np.zeros(0, bool)]) == 0
    assert found[-1].scores == found.scores[5] and len(found[5]) == 1
    with pytest.raises(IndexError, match="6"):
        found[6]


def test_fields_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="classes has 1 rows: expected 2"):
        Detections((4, 5), np.zeros((2, 4)), np.zeros(2), np.zeros(1, int))


def test_a_tensor_of_half_precision_is_converted():
    found = random_instances(3)
    found.scores = found.scores.bfloat16()
    assert np.array_equal(Detections.from_instances(found).scores, found.scores.float().numpy())
