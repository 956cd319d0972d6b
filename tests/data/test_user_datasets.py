"""Registration of user data, and checks of the datasets of a config."""

import json
import logging

from halodet.config import load_config
from halodet.data import register_shapes, write_shapes
from halodet.data.user_datasets import prepare_datasets, register_user_data, register_user_data_again
from halodet.engine import Trainer
from halodet.errors import ConfigError, DatasetError

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances


@pytest.fixture
def config(tmp_path):
    yield load_config("mask_rcnn_halo_h0", ["OUTPUT_DIR", str(tmp_path / "output")])
    for name in ("user_train", "user_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def shapes(tmp_path):
    json_file = write_shapes(tmp_path / "shapes", "train", 3)
    return str(json_file), str(tmp_path / "shapes" / "train")


def test_a_users_json_sets_datasets_classes_and_mask_format(config, shapes, tmp_path, caplog):
    json_file, images = shapes
    data = json.loads(open(json_file).read())
    data["annotations"][0]["category_id"] = 77
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(data))
    with caplog.at_level(logging.INFO):
        cfg = register_user_data(config, str(broken), images, json_file, images)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("user_train",), ("user_val",))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 6
    has_rle = any(isinstance(a["segmentation"], dict) and not a["iscrowd"] for a in data["annotations"][1:])
    assert has_rle and cfg.INPUT.MASK_FORMAT == "bitmask"
    assert "category_id=77" in caplog.text
    dicts = DatasetCatalog.get("user_train")
    assert sum(len(d["annotations"]) for d in dicts) == len(data["annotations"]) - 1
    prepare_datasets(cfg)


def test_polygons_keep_detectron2s_mask_format(config, shapes, tmp_path):
    json_file, images = shapes
    data = json.loads(open(json_file).read())
    data["annotations"] = [a for a in data["annotations"] if isinstance(a["segmentation"], list)]
    polygons = tmp_path / "polygons.json"
    polygons.write_text(json.dumps(data))
    assert register_user_data(config, str(polygons), images, None, None).INPUT.MASK_FORMAT == "polygon"


def test_without_a_val_json_nothing_is_evaluated(config, shapes):
    assert register_user_data(config, *shapes, None, None).DATASETS.TEST == ()


def test_another_process_registers_what_the_first_one_wrote(config, shapes):
    cfg = register_user_data(config, *shapes, *shapes)
    expected = DatasetCatalog.get("user_val")
    for name in ("user_train", "user_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_user_data_again(cfg.OUTPUT_DIR, ["user_train", "user_val"])
    assert DatasetCatalog.get("user_val") == expected


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda data: data["annotations"][1].update(id=data["annotations"][0]["id"]), "not unique"),
        (lambda data: data["annotations"][0].update(category_id=77), "category_id=77"),
        (lambda data: data["annotations"][0].update(bbox=None), "NoneType"),
        (lambda data: data["images"][0].pop("file_name"), "file_name"),
        (lambda data: data.update(annotations=[]), "."),
    ],
    ids=["id twice", "unknown category", "no box", "no file name", "no annotations"],
)
def test_registered_json_that_detectron2_cannot_read_is_an_error(config, shapes, tmp_path, corrupt, message):
    data = json.loads(open(shapes[0]).read())
    corrupt(data)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(data))
    name = "test_registered_broken"
    register_coco_instances(name, {}, str(broken), shapes[1])
    try:
        config.defrost()
        config.DATASETS.TRAIN, config.DATASETS.TEST = (name,), ()
        prepare_datasets(config)
        with pytest.raises(DatasetError, match=f"broken.json .*{message}.*check_dataset.py") as error:
            Trainer.build_train_loader(config)
        assert "\n" not in str(error.value)
        if data["annotations"]:
            config.DATASETS.TEST = (name,)
            with pytest.raises(DatasetError, match=f"broken.json .*{message}"):
                prepare_datasets(config)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_contradictory_arguments_are_an_error(config, shapes, tmp_path):
    with pytest.raises(ConfigError, match="--val-json.*--val-images"):
        register_user_data(config, *shapes, shapes[0], None)
    with pytest.raises(DatasetError, match="gone.json"):
        register_user_data(config, str(tmp_path / "gone.json"), shapes[1], None, None)
    data = json.loads(open(shapes[0]).read())
    data["categories"][2]["name"] = "hexagon"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data))
    with pytest.raises(DatasetError, match="hexagon"):
        register_user_data(config, *shapes, str(other), shapes[1])


def test_missing_datasets_are_an_error(config):
    cfg = config.clone()
    cfg.defrost()
    for train, message in (
        ((), "DATASETS.TRAIN"),
        (("coco_2017_trian",), "coco_2017_trian.*coco_2017_train"),
        (("user_train",), "--train-json"),
    ):
        cfg.DATASETS.TRAIN = train
        with pytest.raises(ConfigError, match=message):
            prepare_datasets(cfg)


def test_shapes_that_cannot_be_written_are_an_error(config, tmp_path):
    cfg = config.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("halodet_shapes_train",), ()
    (tmp_path / "file").touch()
    try:
        register_shapes(tmp_path / "file")
        with pytest.raises(ConfigError, match="file"):
            prepare_datasets(cfg)
    finally:
        register_shapes()


def test_an_evaluation_needs_something_to_evaluate_on(config, shapes):
    with pytest.raises(ConfigError, match="DATASETS.TEST"):
        prepare_datasets(register_user_data(config, *shapes, None, None), train=False)


def test_a_val_json_alone_does_not_train_on_the_configs_dataset(config, shapes):
    with pytest.raises(ConfigError, match="DATASETS.TRAIN"):
        prepare_datasets(register_user_data(config, None, None, *shapes))
