"""Copy-paste against an independent per-pixel computation of image, masks and boxes."""

import functools
import json

from halodet.config.load import load_config
from halodet.data import write_shapes
from halodet.data.bad_images import SKIPPED_KEY
from halodet.data.build import build_train_loader
from halodet.data.copy_paste import choose_objects, paste_objects
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.errors import DatasetError

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BitMasks, Boxes, Instances


@functools.cache
def config(*opts):
    return load_config(
        "quick/mask_rcnn_halo_shapes", ["INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", "0", *opts]
    )


def scene(rng, height, width, count):
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        top, left = rng.integers(0, height - 5), rng.integers(0, width - 5)
        mask[top : top + rng.integers(2, 15), left : left + rng.integers(2, 15)] = True
        mask &= rng.random((height, width)) < 0.8
        mask[top, left] = True
    instances = Instances((height, width))
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    instances.gt_boxes = Boxes(instances.gt_masks.get_bounding_boxes().tensor)
    instances.gt_classes = torch.from_numpy(rng.integers(0, 6, count))
    return image, instances


def by_pixels(image, masks, classes, other_image, other_masks, other_classes, chosen):
    """Compute the result pixel by pixel: (image, [(class, set of its pixels)])."""
    channels, height, width = image.shape
    result = image.copy()
    objects = [(int(c), set(zip(*np.nonzero(m), strict=True))) for c, m in zip(classes, masks, strict=True)]
    pasted = []
    for index in chosen:
        pixels = {(y, x) for y, x in zip(*np.nonzero(other_masks[index]), strict=True) if y < height and x < width}
        for y, x in pixels:
            result[:, y, x] = other_image[:, y, x]
        objects = [(c, left - pixels) for c, left in objects]
        pasted.append((int(other_classes[index]), pixels))
    return result, [(c, pixels) for c, pixels in objects + pasted if pixels]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("other_size", [(30, 40), (50, 25), (20, 60)])
def test_image_masks_and_boxes_equal_a_computation_by_pixels(seed, other_size):
    rng = np.random.default_rng(seed)
    image, instances = scene(rng, 30, 40, 5)
    other_image, other = scene(rng, *other_size, 4)
    chosen = rng.permutation(4)[: rng.integers(1, 5)]
    before = image.clone(), instances.gt_masks.tensor.clone()
    found, objects = paste_objects(image, instances, other_image, other, chosen)
    assert torch.equal(image, before[0]) and torch.equal(instances.gt_masks.tensor, before[1]), (
        "the arguments were changed"
    )
    parts = [(p.gt_masks.tensor.numpy(), p.gt_classes.numpy()) for p in (instances, other)]
    expected, wanted = by_pixels(image.numpy(), *parts[0], other_image.numpy(), *parts[1], chosen)
    assert np.array_equal(found.numpy(), expected)
    assert objects.image_size == (30, 40) and objects.gt_classes.tolist() == [c for c, _ in wanted]
    for mask, box, (_, pixels) in zip(
        objects.gt_masks.tensor.numpy(), objects.gt_boxes.tensor.tolist(), wanted, strict=True
    ):
        assert set(zip(*np.nonzero(mask), strict=True)) == pixels
        ys, xs = zip(*pixels, strict=True)
        assert box == [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def test_a_fully_hidden_object_is_dropped():
    rng = np.random.default_rng(0)
    image, instances = scene(rng, 30, 40, 3)
    _, other = scene(rng, 30, 40, 1)
    other.gt_masks = BitMasks(instances.gt_masks.tensor[1:2].clone())
    _, objects = paste_objects(image, instances, image, other, np.array([0]))
    hidden = {int(c) for c in range(3) if not (instances.gt_masks.tensor[c] & ~instances.gt_masks.tensor[1]).any()}
    assert 1 in hidden and len(objects) == 3 - len(hidden) + 1


def test_an_image_without_objects_gets_some_and_nothing_chosen_changes_nothing():
    rng = np.random.default_rng(1)
    image, _ = scene(rng, 30, 40, 1)
    other_image, other = scene(rng, 30, 40, 2)
    empty = Instances((30, 40), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.int64))
    _, objects = paste_objects(image, empty, other_image, other, np.array([1, 0]))
    assert torch.equal(objects.gt_masks.tensor, other.gt_masks.tensor[[1, 0]])
    assert paste_objects(image, empty, other_image, other, np.array([], int)) == (image, empty)


def test_every_object_is_chosen_equally_often_and_at_least_one():
    np.random.seed(0)
    draws = [choose_objects(4) for _ in range(2000)]
    assert {len(draw) for draw in draws} == {1, 2, 3, 4} and all(len(set(draw)) == len(draw) for draw in draws)
    share = np.bincount(np.concatenate(draws), minlength=4) / len(draws)
    assert np.abs(share - 0.625).max() < 0.05  # the mean of 1/4, 2/4, 3/4 and 4/4


@pytest.fixture
def shapes(tmp_path):
    json_file = write_shapes(tmp_path / "shapes", "train", 8)
    yield json_file, tmp_path / "shapes" / "train"
    if "test_paste" in DatasetCatalog:
        DatasetCatalog.remove("test_paste")
        MetadataCatalog.remove("test_paste")


@pytest.mark.parametrize("lsj", [False, True])
def test_the_mapper_pastes_objects_of_other_images(shapes, lsj):
    entries = load_coco_json(str(shapes[0]), str(shapes[1]))
    learned = {entry["file_name"]: sum(not a["iscrowd"] for a in entry["annotations"]) for entry in entries}
    opts = [
        "INPUT.COPY_PASTE.ENABLED",
        "True",
        "INPUT.LSJ.SIZE",
        "96",
        "INPUT.LSJ.MIN_SCALE",
        "0.8",
        "INPUT.LSJ.ENABLED",
        str(lsj),
    ]
    mapper = RobustDatasetMapper(config(*opts), is_train=True, others=entries)
    np.random.seed(0)
    more = 0
    for entry in entries * 3:
        sample = mapper(entry)
        objects = sample["instances"]
        if len(objects):
            assert objects.gt_masks.tensor.flatten(1).any(dim=1).all() and objects.gt_boxes.nonempty().all()
            assert objects.gt_masks.tensor.shape[1:] == sample["image"].shape[1:] == objects.image_size
        more += len(objects) > learned[entry["file_name"]]
    assert more > 5


def test_bad_second_image_is_reported_and_not_pasted(shapes, tmp_path):
    entries = load_coco_json(str(shapes[0]), str(shapes[1]))
    gone = {**entries[0], "file_name": str(tmp_path / "gone.png")}
    mapper = RobustDatasetMapper(config("INPUT.COPY_PASTE.ENABLED", "True"), is_train=True, others=[gone])
    sample = mapper(entries[1])
    assert [record.file for record in sample[SKIPPED_KEY]] == [gone["file_name"]]
    assert len(sample["instances"]) == sum(not a["iscrowd"] for a in entries[1]["annotations"])


def dataset(shapes, change):
    data = json.loads(shapes[0].read_text())
    for entry in data["annotations"]:
        change(entry)
    shapes[0].write_text(json.dumps(data))
    register_coco_instances("test_paste", {}, str(shapes[0]), str(shapes[1]))


def test_dataset_without_masks_is_an_error(shapes):
    dataset(shapes, lambda entry: entry.pop("segmentation"))
    with pytest.raises(DatasetError, match=r"COPY_PASTE.ENABLED.*(\d+) of \1 .*test_paste"):
        build_train_loader(config("DATASETS.TRAIN", "('test_paste',)", "INPUT.COPY_PASTE.ENABLED", "True"))


def test_rle_masks_need_the_mask_format_that_takes_them(shapes):
    dataset(shapes, lambda entry: None)
    polygon = ["DATASETS.TRAIN", "('test_paste',)", "INPUT.MASK_FORMAT", "polygon"]
    with pytest.raises(
        DatasetError,
        match=r"INPUT.MASK_FORMAT.*\d+ of \d+ .*test_paste",
    ):
        build_train_loader(config(*polygon))
    batch = next(iter(build_train_loader(config(*polygon, "INPUT.COPY_PASTE.ENABLED", "True"))))
    assert len(batch) == 8 and any(len(sample["instances"]) for sample in batch)
