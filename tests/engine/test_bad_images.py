"""Training skips bad images, lists exactly these, and stops when there are too many."""

import json
import logging
import os
from pathlib import Path

from halodet.config import load_config
from halodet.data import write_shapes
from halodet.data.bad_images import TooManyBadImages
from halodet.data.user_datasets import register_user_data
from halodet.engine import Trainer
from halodet.errors import ImageError
from halodet.utils.image_io import read_image

import pytest
import torch
import two_ranks
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import run_ranks

BAD_IMAGES = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bad_inputs" / "images"
TINY = [
    "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)", "MODEL.ROI_BOX_HEAD.NUM_CONV", "0",
    "MODEL.HALONET.MIXERS", "('conv', 'conv', 'conv', 'halo')", "MODEL.MASK_ON", "False",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "64", "INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48",
    "SOLVER.IMS_PER_BATCH", "4",
    "SOLVER.WARMUP_ITERS", "5", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.CHECKPOINT_PERIOD", "30",
    "DATALOADER.NUM_WORKERS", "2",
]  # fmt: skip


@pytest.fixture
def shapes(tmp_path):
    """(json's content, folder of images) of 12 drawn scenes."""
    return json.loads(write_shapes(tmp_path / "shapes", "train", 12).read_text()), tmp_path / "shapes" / "train"


@pytest.fixture
def register(tmp_path):
    names = []

    def add(data, folder):
        names.append(f"test_skipped_{len(names)}")
        path = tmp_path / f"{names[-1]}.json"
        path.write_text(json.dumps(data))
        register_coco_instances(names[-1], {}, str(path), str(folder))
        return names[-1]

    yield add
    for name in (*names, "user_train"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def with_bad(data, folder, count):
    """Cut the last ``count`` files short; returns their paths."""
    paths = [folder / image["file_name"] for image in data["images"][-count:]]
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [str(path) for path in paths]


def config(tmp_path, train, test="", *opts):
    tests = f"('{test}',)" if test else "()"
    paths = ["OUTPUT_DIR", str(tmp_path / "output"), "DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", tests]
    return load_config("quick/mask_rcnn_halo_shapes", [*TINY, *paths, *opts])


def train(cfg, resume=False):
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return json.loads((Path(cfg.OUTPUT_DIR) / "skipped.json").read_text())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_ends_and_lists_exactly_the_bad_files(shapes, register, tmp_path, caplog, workers):
    data, folder = shapes
    bad = with_bad(data, folder, 2)
    options = ["SOLVER.MAX_ITER", "25", "DATALOADER.MAX_BAD_IMAGES", "0.5", "DATALOADER.NUM_WORKERS", str(workers)]
    cfg = config(tmp_path, register(data, folder), "", *options)
    with caplog.at_level(logging.WARNING):
        report = train(cfg)
    assert sorted(entry["file"] for entry in report["files"]) == sorted(bad)
    assert all("truncated" in entry["reason"] and entry["count"] > 1 for entry in report["files"])
    assert report["images_skipped"] == sum(entry["count"] for entry in report["files"])
    assert report["images_seen"] == 25 * 4 + report["images_skipped"]
    assert all(caplog.text.count(path) == 1 for path in bad)


def test_a_resumed_run_goes_on_counting_and_a_new_one_begins_anew(shapes, register, tmp_path):
    data, folder = shapes
    with_bad(data, folder, 1)
    name = register(data, folder)
    first = train(config(tmp_path, name, "", "SOLVER.MAX_ITER", "6"))
    second = train(config(tmp_path, name, "", "SOLVER.MAX_ITER", "10"), resume=True)
    again = train(config(tmp_path, name, "", "SOLVER.MAX_ITER", "3"))
    seen = [report["images_seen"] - report["images_skipped"] for report in (first, second, again)]
    assert seen == [24, 40, 12]


def test_iterations_that_come_again_after_a_kill_are_not_counted_twice(shapes, register, tmp_path):
    data, folder = shapes
    with_bad(data, folder, 2)
    cfg = config(
        tmp_path,
        register(data, folder),
        "",
        "SOLVER.MAX_ITER",
        "24",
        "SOLVER.CHECKPOINT_PERIOD",
        "7",
        "DATALOADER.MAX_BAD_IMAGES",
        "0.5",
    )
    whole = train(cfg)
    for name in ("model_0000013.pth", "model_0000020.pth", "model_final.pth"):
        (tmp_path / "output" / name).unlink()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000006.pth")
    again = train(cfg, resume=True)
    assert again == whole and whole["images_seen"] - whole["images_skipped"] == 24 * 4


def test_too_many_bad_files_stop_the_run_and_are_listed(shapes, register, tmp_path):
    data, folder = shapes
    bad = with_bad(data, folder, 6)
    cfg = config(tmp_path, register(data, folder), "", "SOLVER.MAX_ITER", "100")
    with pytest.raises(TooManyBadImages, match=r"^\d+ of \d+ .*MAX_BAD_IMAGES=0.05") as error:
        train(cfg)
    assert "\n" not in str(error.value) and bad[0].rpartition("/")[0] in str(error.value)
    report = json.loads((tmp_path / "output" / "skipped.json").read_text())
    assert {entry["file"] for entry in report["files"]} <= set(bad) and report["images_seen"] < 300


def test_a_bad_image_counts_as_one_without_detections(shapes, register, tmp_path, caplog):
    data, folder = shapes
    cfg = config(tmp_path, "x", register(data, folder), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    whole = [result["image_id"] for result in predictions(cfg, model)]
    (bad,) = with_bad(data, folder, 1)
    left = [result["image_id"] for result in predictions(cfg, model)]
    last = data["images"][-1]["id"]
    assert last in whole and left == [image_id for image_id in whole if image_id != last]
    report = json.loads((tmp_path / "output" / "skipped.json").read_text())
    assert [entry["file"] for entry in report["evaluation"]] == [bad] and report["files"] == []
    assert "Evaluated 1 unreadable" in caplog.text


def predictions(cfg, model):
    Trainer.test(cfg, model)
    return json.loads((Path(cfg.OUTPUT_DIR) / "inference" / "coco_instances_results.json").read_text())


def test_repeat_factor_sampling_repeats_a_rare_class_of_user_data(shapes, register, tmp_path):
    data, folder = shapes
    rare = data["images"][0]["id"]
    data["annotations"] = [{**a, "iscrowd": 0} for a in data["annotations"]]
    for entry in data["annotations"]:
        entry["category_id"] = 2 if entry["image_id"] == rare else 1
    path = tmp_path / "user.json"
    path.write_text(json.dumps(data))
    opts = [
        "DATALOADER.SAMPLER_TRAIN",
        "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD",
        "1.0",
        "DATALOADER.NUM_WORKERS",
        "0",
    ]
    cfg = register_user_data(config(tmp_path, "x", "", *opts), str(path), str(folder), None, None)
    torch.manual_seed(0)
    drawn = []
    for batch in Trainer.build_train_loader(cfg):
        drawn += [sample["image_id"] for sample in batch]
        if len(drawn) >= 300:
            break
    learned = {entry["image_id"] for entry in data["annotations"]}
    # The rare class is in one image of n, so that image comes sqrt(n) times as often as each other one.
    expected = len(learned) ** 0.5
    others = sum(image_id != rare for image_id in drawn) / (len(learned) - 1)
    assert set(drawn) == learned and 0.7 * expected < drawn.count(rare) / others < 1.4 * expected


@pytest.mark.skipif(
    not BAD_IMAGES.is_dir(), reason=f"no folder {BAD_IMAGES}; set DETECTRON2_DATASETS to one with bad_inputs"
)
def test_real_bad_files_among_good_ones(shapes, register, tmp_path):
    data, folder = shapes
    bad = []
    for number, path in enumerate(sorted(BAD_IMAGES.rglob("*")), start=1000):
        if path.is_file() and path.suffix != ".json":
            try:
                height, width = read_image(path).shape[:2]
            except ImageError:
                height, width = 10, 10
                bad.append(str(path))
            data["images"].append({"id": number, "file_name": str(path), "width": width, "height": height})
    options = [
        "SOLVER.MAX_ITER",
        "40",
        "DATALOADER.MAX_BAD_IMAGES",
        "0.5",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        "False",
    ]
    report = train(config(tmp_path, register(data, folder), "", *options))
    assert len(bad) > 5 and sorted(entry["file"] for entry in report["files"]) == sorted(bad)


@pytest.mark.distributed
@pytest.mark.parametrize("stops", [False, True])
def test_two_processes_count_together_and_stop_together(tmp_path, stops):
    share = 0.1 if stops else 0.3
    codes, log = run_ranks(two_ranks.count_bad_images, str(tmp_path), share, printed=tmp_path / "printed.txt")
    report = json.loads((tmp_path / "skipped.json").read_text())
    iterations = 20 if stops else 50
    # Of five images that come in an iteration one is bad.
    assert codes == [0, 0], log
    assert (report["images_seen"], report["images_skipped"]) == (5 * iterations, iterations), log
    assert {entry["file"]: entry["count"] for entry in report["files"]} == {
        f"{n}.jpg": len(range(n, iterations, 3)) for n in range(3)
    }
    lines = sorted(line for line in log.splitlines() if "stops after" in line)
    assert [line.partition(" images")[0] for line in lines] == (
        [f"rank {n} stops after 20: 20 of 100" for n in (0, 1)] if stops else []
    )
