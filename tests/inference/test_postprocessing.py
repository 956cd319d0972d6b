"""Resizing, mask pasting, semantic and panoptic segmentation in numpy, compared with Detectron2's functions."""

from halodet.data.transforms import ResizeShortestEdge
from halodet.inference.detections import Detections
from halodet.inference.postprocessing import (
    combine_panoptic,
    label_map,
    paste_masks,
    resize_shortest_edge,
    resized_size,
    scale_boxes,
)

import numpy as np
import pytest
import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from helpers import noise


@pytest.mark.parametrize("sizes", [(96, 160), (800, 1333), (0, 1333), (64, 32), (33, 1000)])
def test_images_are_resized_as_by_detectron2(sizes):
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (3, 800), (800, 3), (96, 96), *rng.integers(1, 200, (12, 2)).tolist()]
    for height, width in shapes:
        image = noise(height, width)
        expected = ResizeShortestEdge(*sizes).get_transform(image).apply_image(image)
        assert np.array_equal(resize_shortest_edge(image, *sizes), expected), (height, width)
        flipped = image[:, :, ::-1]  # RGB, a view
        assert np.array_equal(resize_shortest_edge(flipped, *sizes), expected[:, :, ::-1])


def test_sizes_are_those_of_detectron2():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 5000, (2000, 2)).tolist():
        expected = ResizeShortestEdge.get_output_shape(height, width, 800, 1333)
        assert resized_size(height, width, 800, 1333) == tuple(max(side, 1) for side in expected)


def random_boxes(count, height, width, rng):
    """Boxes of all kinds: inside, beyond the image, of one pixel and less, on integers and between them."""
    boxes = rng.uniform(-20, 1.1, (count, 4)) + rng.random((count, 4)) * [width, height, width, height]
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    kind = rng.integers(0, 5, count)
    boxes[kind == 0] = np.floor(boxes[kind == 0])
    boxes[kind == 1, 2:] = boxes[kind == 1, :2] + 1
    boxes[kind == 2, 2:] = boxes[kind == 2, :2] + rng.random(((kind == 2).sum(), 2)) + 1e-3
    boxes[kind == 3] += [-500, -500, 500, 500]
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1e-3)
    visible = (boxes[:, :2] < [width, height]).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    return boxes[visible].astype(np.float32)


@pytest.mark.parametrize("kind", ["smooth", "random", "binary", "half"])
def test_masks_are_pasted_as_by_detectron2(kind):
    rng = np.random.default_rng(0)
    height, width = 120, 170
    boxes = random_boxes(250, height, width, rng)
    count = len(boxes)
    masks = rng.random((count, 28, 28)).astype(np.float32)
    if kind == "smooth":
        y, x = np.mgrid[:28, :28] / 27 - 0.5
        masks = 1 / (1 + np.exp(20 * (np.hypot(y, x)[None] - rng.uniform(0.1, 0.6, (count, 1, 1)))))
        masks = masks.astype(np.float32)
    elif kind == "binary":
        masks = (masks > 0.5).astype(np.float32)
    elif kind == "half":
        masks[:] = 0.5
    found = paste_masks(masks, boxes, (height, width))
    tensors = torch.from_numpy(masks), torch.from_numpy(boxes)
    expected = paste_masks_in_image(*tensors, (height, width)).numpy()
    different = found != expected
    if kind in ("smooth", "random"):
        assert not different.any()
    # Elsewhere only ties may differ: pixels whose exact probability is the threshold.
    lower = paste_masks_in_image(*tensors, (height, width), 0.5 - 1e-5).numpy()
    upper = paste_masks_in_image(*tensors, (height, width), 0.5 + 1e-5).numpy()
    assert not (different & (lower == upper)).any()
    if kind == "binary":
        assert different.sum() <= 1e-4 * expected.size


def test_pasting_nothing_and_outside_of_the_image():
    assert paste_masks(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (5, 6)).shape == (0, 5, 6)
    boxes = np.array([[-50, -50, -10, -10], [100, 100, 120, 120], [3, 3, 3, 3]], np.float32)
    assert not paste_masks(np.ones((3, 28, 28), np.float32), boxes, (50, 60)).any()


def test_boxes_and_masks_are_processed_as_by_detectron2():
    rng = np.random.default_rng(0)
    boxes, masks = random_boxes(150, 96, 128, rng)[:60], rng.random((60, 14, 14)).astype(np.float32)
    boxes[5, 2] = boxes[5, 0]
    found = Instances((96, 128), pred_boxes=Boxes(torch.from_numpy(boxes.copy())), index=torch.arange(60))
    found.pred_masks = torch.from_numpy(masks)[:, None]
    expected = detector_postprocess(found, 301, 407)
    scaled, keep = scale_boxes(boxes, (96, 128), (301, 407))
    assert np.array_equal(np.flatnonzero(keep), expected.index.numpy()) and not keep[5]
    assert np.array_equal(scaled[keep], expected.pred_boxes.tensor.numpy())
    assert np.array_equal(paste_masks(masks[keep], scaled[keep], (301, 407)), expected.pred_masks.numpy())
    boxes[7, 0], boxes[8, 3] = np.nan, np.inf
    assert not scale_boxes(boxes, (96, 128), (301, 407))[1][[7, 8]].any()


@pytest.mark.parametrize("size", [(60, 90), (301, 407), (29, 31), (96, 144)])
def test_semantic_classes_are_those_of_detectron2(size):
    logits = torch.randn(7, 32, 40, generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.avg_pool2d(logits, 5, stride=1, padding=2)
    enlarged = torch.nn.functional.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    scores = sem_seg_postprocess(enlarged, (96, 144), *size)
    found, expected = label_map(logits.numpy(), 4, (96, 144), size), scores.argmax(0).numpy()
    assert found.dtype == np.int32 and found.shape == size
    top = scores.topk(2, dim=0).values
    assert not ((found != expected) & ((top[0] - top[1]).numpy() > 1e-5)).any()
    assert (found != expected).sum() <= 2


@pytest.mark.parametrize("limit", [0, 50, 4096])
@pytest.mark.parametrize("count", [0, 12])
def test_panoptic_segments_are_those_of_detectron2(count, limit):
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 5, (8, 9)), np.ones((10, 10), np.int64))
    masks = np.zeros((count, 80, 90), bool)
    for mask in masks:
        x, y = rng.integers(0, 60, 2)
        mask[y : y + 25, x : x + 30] = True
    masks[3:4] = False
    scores = rng.permutation(np.linspace(0.3, 0.99, count)).astype(np.float32)
    classes = rng.integers(0, 3, count)
    detections = Detections((80, 90), np.zeros((count, 4), np.float32), scores, classes, masks)
    instances = Instances((80, 90), scores=torch.from_numpy(scores), pred_classes=torch.from_numpy(classes))
    instances.pred_masks = torch.from_numpy(masks)
    expected, infos = combine_semantic_and_instance_outputs(instances, torch.from_numpy(labels), 0.5, limit, 0.5)
    options = {"overlap_threshold": 0.5, "stuff_area_limit": limit, "instances_confidence_threshold": 0.5}
    found = combine_panoptic(detections, labels.astype(np.int32), **options)
    assert found[0].dtype == np.int32 and np.array_equal(found[0], expected.numpy()) and found[1] == infos
    without_masks = Detections((80, 90), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    assert not any(info["isthing"] for info in combine_panoptic(without_masks, labels, **options)[1])
