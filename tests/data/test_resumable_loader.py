"""Batches are a function of the seed: same order as Detectron2, for any number of workers and any start."""

import random
from itertools import islice

from halodet.config.load import load_config
from halodet.data import ResumableTrainLoader, write_shapes

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.env import seed_all_rng

NAME = "resumable_shapes"


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    register_coco_instances(NAME, {}, str(write_shapes(root, "train", 12)), str(root / "train"))
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(*opts, seed=7, batch=3, workers=0):
    small = [
        "INPUT.MIN_SIZE_TRAIN",
        "(48, 64)",
        "INPUT.MIN_SIZE_TRAIN_SAMPLING",
        "choice",
        "DATASETS.TRAIN",
        f"('{NAME}',)",
    ]
    numbers = ["SEED", str(seed), "SOLVER.IMS_PER_BATCH", str(batch), "DATALOADER.NUM_WORKERS", str(workers)]
    return load_config("quick/mask_rcnn_halo_shapes", [*small, *numbers, *opts])


def files(batch):
    return [sample["file_name"] for sample in batch]


def equal(left, right):
    return (
        files(left) == files(right)
        and all(torch.equal(a["image"], b["image"]) for a, b in zip(left, right, strict=True))
        and all(
            torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
            for a, b in zip(left, right, strict=True)
        )
    )


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_the_order_is_detectron2s(sampler, grouping):
    cfg = config(
        "DATALOADER.SAMPLER_TRAIN",
        sampler,
        "DATALOADER.ASPECT_RATIO_GROUPING",
        str(grouping),
        "DATALOADER.REPEAT_THRESHOLD",
        "0.9",
    )
    ours = ResumableTrainLoader(cfg)
    sampler = ours._batch_sampler.sampler
    theirs = build_detection_train_loader(cfg, sampler=sampler)
    assert [files(batch) for batch in islice(ours, 12)] == [files(batch) for batch in islice(theirs, 12)]


def test_batches_are_of_one_group():
    for batch in islice(ResumableTrainLoader(config()), 10):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1 and len(batch) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_and_number_of_workers_gives_the_same_batches(workers):
    whole = list(islice(ResumableTrainLoader(config()), 9))
    assert len({sample["image"].shape for batch in whole for sample in batch}) > 3, "nothing was augmented"
    later = ResumableTrainLoader(config(workers=workers))
    later.start = 4
    for expected, batch in zip(whole[4:], islice(later, 5), strict=True):
        assert equal(expected, batch)
    assert later.batches == 9


def test_another_seed_gives_other_batches():
    one, other = (
        next(iter(ResumableTrainLoader(config("DATALOADER.ASPECT_RATIO_GROUPING", "False", seed=seed, batch=8))))
        for seed in (7, 8)
    )
    assert files(one) != files(other)
    seed_all_rng(1)
    drawn = ResumableTrainLoader(config(seed=-1)).seed
    seed_all_rng(1)
    assert drawn == ResumableTrainLoader(config(seed=-1)).seed != ResumableTrainLoader(config(seed=-1)).seed


def test_the_models_random_numbers_are_left_alone():
    loader = ResumableTrainLoader(config())
    seed_all_rng(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    seed_all_rng(3)
    next(iter(loader))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


class Rejecting:
    """A mapper that maps some files to None."""

    def __init__(self, cfg, rejected):
        self.mapper, self.rejected = DatasetMapper(cfg, True), rejected

    def __call__(self, entry):
        return None if entry["file_name"] in self.rejected else self.mapper(entry)


def test_replacement_of_unusable_images_is_reproducible():
    cfg = config()
    rejected = set(files(next(iter(ResumableTrainLoader(cfg))))[:2])
    whole = list(islice(ResumableTrainLoader(cfg, Rejecting(cfg, rejected)), 6))
    assert not rejected & {name for batch in whole for name in files(batch)}
    assert all(len(batch) == 3 and len({s["width"] > s["height"] for s in batch}) == 1 for batch in whole)
    later = ResumableTrainLoader(config(workers=2), Rejecting(cfg, rejected))
    later.start = 3
    assert all(equal(expected, batch) for expected, batch in zip(whole[3:], islice(later, 3), strict=True))


def test_a_dataset_without_any_usable_image_is_an_error():
    cfg = config()
    everything = {entry["file_name"] for entry in DatasetCatalog.get(NAME)}
    with pytest.raises(RuntimeError, match="100 "):
        next(iter(ResumableTrainLoader(cfg, Rejecting(cfg, everything))))


def test_group_without_a_usable_image_is_replaced_by_the_other():
    cfg = config()
    mapper = DatasetMapper(cfg, is_train=True)
    loader = ResumableTrainLoader(cfg, lambda entry: mapper(entry) if entry["width"] > entry["height"] else None)
    drawn = [sample for batch in islice(ResumableTrainLoader(cfg), 6) for sample in batch]
    assert any(sample["width"] <= sample["height"] for sample in drawn), "the test shows nothing"
    given = [sample for batch in islice(loader, 6) for sample in batch]
    assert len(given) == len(drawn) and all(sample["width"] > sample["height"] for sample in given)
