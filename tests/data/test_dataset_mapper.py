"""Training and evaluation skip bad images and annotations and report them."""

import functools
import json
import os
import re
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

from halodet.config.load import load_config
from halodet.data.annotations import validate_record
from halodet.data.bad_images import SKIPPED_KEY, TooManyBadImages
from halodet.data.build import build_test_loader, build_train_loader
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.errors import ImageError
from halodet.utils.image_io import read_image

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import BoxMode
from helpers import noise, png, truncate
from PIL import Image

WIDTH, HEIGHT = 60, 40
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
BAD_IMAGES = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bad_inputs" / "images"


@functools.cache
def config(*opts):
    return load_config(
        "quick/mask_rcnn_halo_shapes", ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", *map(str, opts)]
    )


def annotation(**changes):
    common = {
        "bbox": [10, 10, 20, 20],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": [SQUARE],
    }
    return {**common, **changes}


def entry(path, width=WIDTH, height=HEIGHT, annotations=None):
    annotations = [annotation()] if annotations is None else annotations
    return {"file_name": str(path), "image_id": 7, "width": width, "height": height, "annotations": annotations}


def image(width=WIDTH, height=HEIGHT):
    return Image.fromarray(noise(height, width))


@pytest.fixture
def good(tmp_path):
    image().save(tmp_path / "good.png")
    return entry(tmp_path / "good.png")


def bomb(path):
    """Write a PNG of a few bytes whose header declares 400 million pixels."""
    path.write_bytes(png(20000, 20000, bytes(10000)))


def cut(path):
    image().save(path)
    truncate(path, 2 / 3)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image().save(path, exif=exif)


BAD = {
    "cut.png": (cut, "truncated|broken data stream"),
    "cut.jpg": (cut, "truncated"),
    "text.jpg": (lambda path: path.write_text("not an image"), "not an image"),
    "empty.png": (lambda path: path.write_bytes(b""), "empty file"),
    "gone.png": (lambda path: None, "does not exist"),
    "folder.png": (lambda path: path.mkdir(), "folder"),
    "small.png": (lambda path: image(30, 20).save(path), "30 x 20 .*60 x 40"),
    "rotated.jpg": (rotated, "40 x 60 .*60 x 40"),
    "bomb.png": (bomb, "decompression bomb"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_skipped_and_reported_with_the_next_sample(name, tmp_path, good):
    make, reason = BAD[name]
    make(tmp_path / name)
    mapper = RobustDatasetMapper(config(), is_train=True)
    assert mapper(entry(tmp_path / name)) is None
    sample = mapper(good)
    (record,) = sample[SKIPPED_KEY]
    assert record.file == str(tmp_path / name) and record.annotation is None
    assert str(record).count(str(tmp_path)) == 1 and "\n" not in str(record)
    assert re.search(reason, record.reason), record
    assert SKIPPED_KEY not in mapper(good)


def test_rotated_image_of_the_right_size_is_read_upright(tmp_path):
    rotated(tmp_path / "rotated.png")
    cfg = config(
        "INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN", "(60,)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"
    )
    mapper = RobustDatasetMapper(cfg, is_train=True)
    sample = mapper(entry(tmp_path / "rotated.png", HEIGHT, WIDTH, [annotation(bbox=[1, 2, 30, 40])]))
    assert sample["image"].shape == (3, 90, 60)  # 40 x 60 pixels scaled by 1.5


@pytest.mark.parametrize("form", ["BGR", "RGB"])
def test_good_image_is_mapped_as_by_detectron2(good, form):
    cfg = config("INPUT.FORMAT", form)
    samples = []
    for mapper in (RobustDatasetMapper(cfg, is_train=True), DatasetMapper(cfg, is_train=True)):
        np.random.seed(3)
        samples.append(mapper(good))
    ours, detectron2s = samples
    assert ours.keys() == detectron2s.keys()
    assert torch.equal(ours["image"], detectron2s["image"])
    assert torch.equal(ours["instances"].gt_boxes.tensor, detectron2s["instances"].gt_boxes.tensor)
    assert torch.equal(ours["instances"].gt_masks.tensor, detectron2s["instances"].gt_masks.tensor)


def test_images_are_read_as_for_inference(tmp_path):
    values = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "16bit.png")
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8), "CMYK").save(
        tmp_path / "cmyk.jpg"
    )
    mapper = RobustDatasetMapper(config("INPUT.MIN_SIZE_TEST", HEIGHT), is_train=False)
    for path in (tmp_path / "16bit.png", tmp_path / "cmyk.jpg"):
        assert np.array_equal(mapper(entry(path))["image"].permute(1, 2, 0).numpy(), read_image(path))


RLE = mask_util.encode(np.asfortranarray(np.pad(np.ones((20, 20), np.uint8), ((10, 10), (10, 30)))))
INVALID = {
    "no area": ({"bbox": [10, 10, 0, 20]}, "bbox.*0 x 20"),
    "backwards": ({"bbox": [30, 30, 10, 10], "bbox_mode": BoxMode.XYXY_ABS}, "bbox.*-20 x -20"),
    "outside": ({"bbox": [500, 500, 10, 10]}, "bbox.*60 x 40"),
    "not a number": ({"bbox": [10, float("nan"), 20, 20]}, "bbox"),
    "short": ({"bbox": [10, 20]}, "bbox"),
    "no mask": ({"segmentation": None}, "segmentation"),
    "empty mask": ({"segmentation": []}, r"segmentation=\[\]"),
    "line": ({"segmentation": [[1, 2, 3, 4]]}, "has 4 numbers"),
    "nan in mask": ({"segmentation": [[1, 2, float("nan"), 4, 5, 6]]}, "nan"),
    "other size": ({"segmentation": {**RLE, "size": [3, 4]}}, r"RLE size=\[3, 4\]"),
    "broken": ({"segmentation": {**RLE, "counts": RLE["counts"][:3]}}, "RLE"),
}


def validated(record):
    validate_record(record, need_mask=True)
    return record


@pytest.mark.parametrize("name", INVALID)
def test_invalid_annotation_is_skipped_and_the_others_are_kept(name, good):
    changes, reason = INVALID[name]
    mapper = RobustDatasetMapper(config(), is_train=True)
    annotations = [annotation(), annotation(**changes), annotation(segmentation=RLE, category_id=2)]
    sample = mapper(validated({**good, "annotations": annotations}))
    assert sample["instances"].gt_classes.tolist() == [1, 2]
    (record,) = sample[SKIPPED_KEY]
    assert (record.file, record.annotation) == (good["file_name"], 1) and re.search(reason, record.reason)


def test_image_without_any_valid_annotation_is_skipped(good):
    mapper = RobustDatasetMapper(config(), is_train=True)
    assert mapper(validated({**good, "annotations": [annotation(bbox=[0, 0, 0, 0]), annotation(iscrowd=1)]})) is None
    records = mapper(good)[SKIPPED_KEY]
    assert [record.annotation for record in records] == [0, None] and "1 annotations" in records[1].reason


def test_image_without_objects_is_used(good):
    sample = RobustDatasetMapper(config("INPUT.CROP.ENABLED", "True"), is_train=True)(
        {**good, "annotations": [annotation(iscrowd=1)]}
    )
    assert len(sample["instances"]) == 0 and SKIPPED_KEY not in sample


def test_object_outside_the_crop_is_dropped_silently(good):
    cfg = config("INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[2, 2]")
    mapper = RobustDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    counts = set()
    for _ in range(30):
        sample = mapper(good)
        counts.add(len(sample["instances"]))
        assert SKIPPED_KEY not in sample and torch.isfinite(sample["instances"].gt_boxes.tensor).all()
    assert counts == {0, 1}


def test_very_long_images_keep_a_pixel(tmp_path):
    image(8000, 3).save(tmp_path / "long.png")
    sample = RobustDatasetMapper(config(), is_train=True)(entry(tmp_path / "long.png", 8000, 3, []))
    assert sample["image"].shape == (3, 1, 1333)


def test_only_bad_files_is_an_error(tmp_path):
    mapper = RobustDatasetMapper(config(), is_train=True)
    with pytest.raises(TooManyBadImages, match="20 images in a row .*gone.png .does not exist") as error:
        for _ in range(50):
            mapper(entry(tmp_path / "gone.png"))
    assert "\n" not in str(error.value)


@pytest.fixture
def registered():
    names = []

    def register(entries):
        names.append(f"test_mapper_{len(names)}")
        DatasetCatalog.register(names[-1], lambda: entries)
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.remove(name)


@pytest.mark.parametrize("workers", [0, 2])
def test_wrong_image_folder_is_an_error_at_once(registered, tmp_path, workers):
    name = registered([entry(tmp_path / f"{n}.png") for n in range(4)])
    loader = build_train_loader(config("DATASETS.TRAIN", f"('{name}',)", "DATALOADER.NUM_WORKERS", workers))
    with pytest.raises(TooManyBadImages) as error:
        next(iter(loader))
    assert str(error.value).startswith("4 images") and "\n" not in str(error.value)
    traceback.clear_frames(error.tb)  # they hold the workers, for which a garbage collection would wait


def test_evaluation_gets_a_marked_blank_image(registered, tmp_path, good):
    cut(tmp_path / "cut.jpg")
    name = registered([entry(tmp_path / "cut.jpg"), good])
    bad, fine = (batch[0] for batch in build_test_loader(config(), name))
    assert bad["image_id"] == 7 and bad["image"].shape[0] == 3 and not bad["image"].any()
    assert [record.file for record in bad[SKIPPED_KEY]] == [str(tmp_path / "cut.jpg")]
    assert SKIPPED_KEY not in fine and "annotations" not in fine and fine["image"].any()


def test_worker_survives_sigterm(registered, good):
    name = registered([good] * 40)
    batches = iter(build_test_loader(config("DATALOADER.NUM_WORKERS", 1), name))
    next(batches)
    subprocess.run(["kill", "-TERM", str(batches._workers[0].pid)], check=True)  # by another process
    assert len(list(batches)) == 39


@pytest.mark.distributed
def test_a_process_that_fails_while_workers_run_ends_at_once(good):
    """Regression: the workers ignored the SIGTERM of their parent's exit, which waited for them for ten minutes."""
    code = f"""
        import json
        from halodet.config import load_config
        from halodet.data.build import build_test_loader, build_train_loader
        from detectron2.data import DatasetCatalog

        DatasetCatalog.register("photos", lambda: [json.loads({json.dumps(good)!r})] * 40)
        cfg = load_config("mask_rcnn_halo_h0", ["DATASETS.TRAIN", "('photos',)", "DATALOADER.NUM_WORKERS", "2"])
        running = [iter(build_train_loader(cfg)), iter(build_test_loader(cfg, "photos"))]
        print([len(next(batches)) for batches in running])
        raise RuntimeError("a mistake of the user")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100)
    assert done.stdout == "[16, 1]\n", done.stderr
    assert done.returncode == 1 and "a mistake of the user" in done.stderr


@pytest.mark.skipif(
    not BAD_IMAGES.is_dir(), reason=f"no folder {BAD_IMAGES}; set DETECTRON2_DATASETS to one with bad_inputs"
)
def test_unreadable_real_files_are_skipped(good):
    mapper = RobustDatasetMapper(config(), is_train=True)
    for path in (path for path in sorted(BAD_IMAGES.rglob("*")) if path.is_file() and path.suffix != ".json"):
        try:
            height, width = read_image(path).shape[:2]
            readable = True
        except ImageError:
            width, height, readable = 10, 10, False
        assert (mapper(entry(path, width, height, [])) is not None) == readable, path
        records = mapper(good).get(SKIPPED_KEY, [])
        assert [record.file for record in records] == ([] if readable else [str(path)]), path
