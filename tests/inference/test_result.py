"""Result and BasePredictor: views of the output, selection, conversions, files and streams."""

import json

from halodet.errors import ImageError
from halodet.inference import Detections, PredictorError, Result, ResultError
from halodet.inference.base_predictor import BasePredictor
from halodet.inference.postprocessing import combine_panoptic

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import noise
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

CLASSES = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]


def instances(height=40, width=60, keypoints=False):
    """Two dogs and a cat; the second dog has the lowest score."""
    boxes = torch.tensor([[2.0, 1, 22, 31], [30, 10, 50, 30], [5, 5, 15, 15]])
    fields = {"scores": torch.tensor([0.9, 0.4, 0.6]), "pred_classes": torch.tensor([1, 1, 0])}
    found = Instances((height, width), pred_boxes=Boxes(boxes), **fields)
    found.pred_masks = torch.zeros(3, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(found.pred_masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    if keypoints:
        found.pred_keypoints = torch.rand(3, 5, 3)
    return found


@pytest.fixture
def result():
    return Result(noise(40, 60), {"instances": instances()}, CLASSES)


def panoptic_result():
    ids = np.zeros((40, 60), np.int32)
    ids[:20], ids[20:30], ids[30:] = 1, 2, 3
    infos = [
        {"id": 1, "isthing": True, "score": 0.9, "category_id": 1, "instance_id": 0},
        {"id": 2, "isthing": True, "score": 0.6, "category_id": 0, "instance_id": 2},
        {"id": 3, "isthing": False, "category_id": 2, "area": 600},
    ]
    semantic = np.zeros((3, 40, 60), np.float32)
    semantic[2, 30:] = 1
    output = {"instances": instances(), "panoptic_seg": (ids, infos), "sem_seg": torch.from_numpy(semantic)}
    return Result(noise(40, 60), output, CLASSES, ["things", "sky", "grass"])


def test_views_of_the_output(result):
    expected = Detections.from_instances(instances())
    assert len(result) == 3 and result.image_size == (40, 60)
    assert result.names == ["dog", "dog", "cat"] and result.labels.tolist() == [1, 1, 0]
    for name in ("boxes", "scores", "masks"):
        assert np.array_equal(getattr(result, name), getattr(expected, name))
    assert result.keypoints is None and result.sem_seg is None and result.panoptic_seg is None
    assert Result(noise(40, 60), {"instances": instances(keypoints=True)}, CLASSES).keypoints.shape == (3, 5, 3)


@pytest.mark.parametrize(
    ("item", "expected"),
    [(0, [0]), (-1, [2]), (slice(1, None), [1, 2]), (np.array([2, 0]), [2, 0]), ([True, False, True], [0, 2])],
)
def test_indexing_selects_objects(result, item, expected):
    selected = result[np.array(item) if isinstance(item, list) else item]
    assert isinstance(selected, Result) and np.array_equal(selected.boxes, result.boxes[expected])
    assert np.array_equal(selected.masks, result.masks[expected]) and selected.image is result.image
    assert selected.names == [result.names[k] for k in expected]


def test_filter_by_score_and_name(result):
    assert result.filter(0.6).names == ["dog", "cat"]  # at least the score, in float32
    assert result.filter(names=["dog"]).scores.tolist() == pytest.approx([0.9, 0.4])
    assert len(result.filter(0.95)) == len(result.filter(names=[])) == 0
    assert len(result) == 3


def test_segments_keep_their_objects_and_tracks():
    result = panoptic_result().with_track_ids(np.array([7, -1, 3]))
    assert result.track_ids.tolist() == [7, -1, 3]
    assert [info.get("track_id") for info in result.panoptic_seg[1]] == [7, 3, None]
    cats = result.filter(names=["cat"])
    [info] = cats.panoptic_seg[1]
    assert info["instance_id"] == 0 and info["track_id"] == 3 and cats.track_ids.tolist() == [3]
    tracked = cats.with_track_ids(np.array([5]))
    assert tracked.panoptic_seg[1][0]["track_id"] == 5


def test_segments_are_combined_again_for_a_higher_score():
    """What an object below the score covered is not empty; the rest is that of combine_panoptic."""
    detections = Detections.from_instances(instances())  # the dog of score 0.4 is at y 10 to 30, x 30 to 50
    labels = np.full((40, 60), 2)
    options = {"overlap_threshold": 0.5, "stuff_area_limit": 1, "instances_confidence_threshold": 0.1}
    output = {
        "instances": detections,
        "sem_seg": labels,
        "panoptic_seg": combine_panoptic(detections, labels, **options),
    }
    result = Result(noise(40, 60), output, CLASSES, ["things", "sky", "grass"], panoptic=options)
    assert [info.get("score", 0) for info in result.panoptic_seg[1]] == pytest.approx([0.9, 0.4, 0])
    tracked = result.with_track_ids(np.array([7, 8, 9]))
    for given, tracks in ((result, [None, None]), (tracked, [7, None])):
        ids, infos = given.filter(0.5).panoptic_seg
        expected = combine_panoptic(detections, labels, **{**options, "instances_confidence_threshold": 0.5})
        assert np.array_equal(ids, expected[0]) and (ids > 0).all()
        assert [info["category_id"] for info in infos] == [info["category_id"] for info in expected[1]] == [1, 2]
        assert [info.get("track_id") for info in infos] == tracks
    assert len(result.filter(0.05).panoptic_seg[1]) == len(result.panoptic_seg[1]) == 3
    assert len(result[:1].filter(0.5).panoptic_seg[1]) == 2  # of the selected dog and grass, by their scores
    dogs = result.filter(0.05, ["dog"]).filter(0.5).panoptic_seg  # what was removed does not come back
    assert [info["category_id"] for info in dogs[1]] == [1] and (dogs[0] == 0).any()


def test_segments_of_objects_that_were_selected():
    result = panoptic_result()  # its segments are those of the objects 0 and 2
    reversed_rows = result[::-1]
    assert [info.get("instance_id") for info in reversed_rows.panoptic_seg[1]] == [2, 0, None]
    last = result[2].with_track_ids(np.array([4]))
    assert [info.get("instance_id") for info in last.panoptic_seg[1]] == [None, 0, None]
    assert [info.get("track_id") for info in last.panoptic_seg[1]] == [None, 4, None]
    assert [info.get("instance_id") for info in result.panoptic_seg[1]] == [0, 2, None]


def test_segments_have_the_color_of_their_track():
    untracked = panoptic_result()

    def pixel(result):
        """Color of the second object, away from its label."""
        return np.asarray(result.draw())[110, 230].tolist()

    a, b, c, d = (untracked.with_track_ids(np.array(ids)) for ids in ([7, 0, 3], [1, 0, 3], [7, 0, 4], [7, 0, -1]))
    assert pixel(a) == pixel(b) != pixel(c) and pixel(d) == pixel(untracked)


def test_names_that_the_model_lacks_are_an_error(result):
    with pytest.raises(ResultError, match="dgo is none of the 2 classes of the model; similar: dog"):
        result.filter(names=["cat", "dgo"])


def test_filter_keeps_segments_that_match():
    result = panoptic_result()
    assert result.sem_seg.shape == (40, 60) and result.sem_seg[35, 5] == 2
    ids, infos = result.filter(0.7).panoptic_seg
    assert [info["id"] for info in infos] == [1, 3] and set(np.unique(ids)) == {0, 1, 3} and (ids[20:30] == 0).all()
    ids, infos = result.filter(names=["grass"]).panoptic_seg
    assert [info["id"] for info in infos] == [3] and (ids[:30] == 0).all() and (ids[30:] == 3).all()
    assert len(result.panoptic_seg[1]) == 3 and "3 segments" in repr(result)
    changed = np.asarray(result.filter(names=["grass"]).draw()) != np.asarray(result.draw())
    assert changed[: changed.shape[0] // 2].any()


def test_filter_keeps_semantic_classes_that_match():
    semantic = np.zeros((40, 60), np.int64)
    semantic[30:] = 2
    result = Result(noise(40, 60), {"sem_seg": semantic}, [], ["things", "sky", "grass"])
    assert "2 semantic classes" in repr(result)
    filtered = result.filter(0.9, ["grass", "sky"])
    assert np.array_equal(filtered.sem_seg, np.where(semantic == 2, 2, -1)) and "1 semantic classes" in repr(filtered)
    height = filtered.draw().height  # nothing is drawn where no class is chosen
    plain = np.asarray(result.filter(names=[]).draw())[: height // 2]
    assert np.array_equal(np.asarray(filtered.draw())[: height // 2], plain)
    assert np.array_equal(result.filter(0.9).sem_seg, semantic)


def test_repr_counts_the_classes(result):
    text = repr(result)
    assert "60x40" in text and "3 objects" in text and "2 dog" in text and "1 cat" in text
    assert "0 objects" in repr(result[[]]) and "1 object:" in repr(result[0])


def test_coco_annotations_are_read_by_pycocotools(result, tmp_path):
    result.save(tmp_path / "a.json")
    coco = COCO(str(tmp_path / "a.json"))
    assert coco.imgs[1]["width"] == 60 and coco.imgs[1]["height"] == 40 and coco.imgs[1]["file_name"] == "a"
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    assert [a["category_id"] for a in annotations] == [18, 18, 17] and len({a["id"] for a in annotations}) == 3
    for annotation, mask in zip(annotations, result.masks, strict=True):
        assert np.array_equal(mask_util.decode(annotation["segmentation"]), mask) and annotation["area"] == mask.sum()
    assert {a["image_id"] for a in result.to_coco(image_id=7)} == {7}


def test_supervision_has_the_same_objects(result):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = result.to_supervision()
    assert isinstance(found, supervision.Detections) and len(found) == 3
    assert np.array_equal(found.xyxy, result.boxes) and np.array_equal(found.mask, result.masks)
    assert found.class_id.tolist() == [1, 1, 0] and found.data["class_name"].tolist() == result.names
    assert np.allclose(found.confidence, result.scores)
    assert len(result[[]].to_supervision()) == 0


def test_supervision_that_is_not_installed_is_named(result, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ResultError, match="pip install supervision"):
        result.to_supervision()


def test_drawings_are_saved_as_drawn(result, tmp_path):
    drawing = result.draw()
    assert isinstance(drawing, Image.Image) and drawing.size == (240, 160)  # four times the image
    result.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(drawing))
    plain = np.asarray(result[[]].draw())
    assert (np.asarray(drawing) != plain).mean() > 0.1
    for suffix in ("jpg", "webp"):
        result.save(tmp_path / f"a.{suffix}")
        assert Image.open(tmp_path / f"a.{suffix}").size == drawing.size


def test_files_that_cannot_be_saved_are_named(result, tmp_path):
    with pytest.raises(ResultError, match=r"a\.gif"):
        result.save(tmp_path / "a.gif")
    with pytest.raises(ResultError, match="none"):
        result.save(tmp_path / "none" / "a.png")
    assert not list(tmp_path.iterdir())


class Brightness(BasePredictor):
    """Finds one object with the brightness of the image as its score; remembers what it was given."""

    classes, stuff_classes = CLASSES, []

    def __init__(self):
        self.batches = []

    def predict(self, image):
        return self.predict_batch([image])[0]

    def predict_batch(self, images):
        self.batches.append(len(images))
        score = [np.float32(image.mean() / 255) for image in images]
        box = np.array([[0, 0, 4, 4]], np.float32)
        return [{"instances": Detections((8, 8), box, np.array([s]), np.array([0]))} for s in score]


def test_an_image_gives_a_result_and_many_a_stream(tmp_path):
    predictor = Brightness()
    images = [np.full((8, 8, 3), k, np.uint8) for k in (10, 20, 30)]
    Image.fromarray(images[1]).save(tmp_path / "a.png")
    assert predictor(images[0]).scores[0] == pytest.approx(10 / 255)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(images[1])):
        assert predictor(image).scores[0] == pytest.approx(20 / 255)
    assert predictor(torch.full((3, 8, 8), 30, dtype=torch.uint8)).scores[0] == pytest.approx(30 / 255)
    for many in (images, tuple(images), iter(images), (image for image in images)):
        assert [result.scores[0] * 255 for result in predictor(many)] == pytest.approx([10, 20, 30])
    assert list(predictor([])) == []


def test_a_stream_reads_an_image_when_its_result_is_asked_for():
    predictor, read = Brightness(), []

    def images():
        for k in range(100):
            read.append(k)
            yield np.full((8, 8, 3), k, np.uint8)

    results = predictor(images())
    assert read == []
    next(results)
    next(results)
    assert read == [0, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 10])
def test_a_stream_in_batches(batch_size):
    predictor = Brightness()
    images = [np.full((8, 8, 3), k, np.uint8) for k in range(5)]
    results = list(predictor.stream(images, batch_size=batch_size))
    assert [round(float(result.scores[0] * 255)) for result in results] == [0, 1, 2, 3, 4]
    assert max(predictor.batches) == min(batch_size, 5) and sum(predictor.batches) == 5


def test_results_of_files_have_their_names(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        Image.fromarray(noise(20, 30)).save(path)
    predictor = Brightness()
    results = list(predictor.stream([paths[0], str(paths[1]), noise(20, 30)], batch_size=2))
    assert [result.file_name for result in results] == [str(paths[0]), str(paths[1]), None]
    assert repr(results[0]).startswith("<Result a.png, 30x20") and results[0].filter(0.1).file_name == str(paths[0])
    results[1].save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["images"][0]["file_name"] == "b.png"
    [result] = predictor.stream(str(paths[0]))  # one image, not its characters
    assert result.file_name == str(paths[0])


def test_what_is_no_stream_is_named():
    with pytest.raises(PredictorError, match="bytes"):
        Brightness()(b"\x89PNG")
    for batch_size in (0, -1):
        with pytest.raises(PredictorError, match=f"batch_size={batch_size}"):
            Brightness().stream([noise(20, 30)], batch_size=batch_size)


def test_a_file_that_is_no_image_stops_a_stream(tmp_path):
    (tmp_path / "a.png").write_text("text")
    results = Brightness()([np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png"])
    next(results)
    with pytest.raises(ImageError, match=r"a\.png"):
        next(results)
