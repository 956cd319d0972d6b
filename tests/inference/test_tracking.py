"""Tracker: ids against the known truth, and how they appear in results and drawings."""

import sys

from halodet.inference import Detections, Result
from halodet.inference.tracking import Tracker, TrackerError

import numpy as np
import pytest
from helpers import noise

CLASSES = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
SIZE = (200, 300)


def result(boxes, scores=None, classes=None):
    """A result with the given x1, y1, x2, y2 boxes."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.full(len(boxes), 0.9, np.float32) if scores is None else np.array(scores, np.float32)
    found = Detections(SIZE, boxes, scores, np.zeros(len(boxes), int) if classes is None else np.array(classes))
    return Result(np.zeros((*SIZE, 3), np.uint8), {"instances": found}, CLASSES)


def two_objects(frame, step=2):
    """Boxes of an object that moves right and one that moves left, above and below."""
    x = frame * step
    return [[10 + x, 20, 50 + x, 60], [240 - x, 120, 280 - x, 160]]


@pytest.fixture
def tracker():
    pytest.importorskip("trackers", reason="trackers is not installed")
    return Tracker(30)


def test_ids_follow_the_objects_whatever_their_order(tracker):
    rng = np.random.default_rng(0)
    ids = []
    for frame in range(60):
        order = rng.permutation(2)
        tracked = tracker.update(result(np.array(two_objects(frame))[order]))
        ids.append(tracked.track_ids[np.argsort(order)].tolist())
        assert np.array_equal(tracked.boxes, np.array(two_objects(frame), np.float32)[order])
    assert ids[0] == [-1, -1] and len(set(ids[1])) == 2 and min(ids[1]) >= 0
    assert all(found == ids[1] for found in ids[1:])


def test_an_object_that_is_missed_for_some_frames_keeps_its_id(tracker):
    for frame in range(20):
        before = tracker.update(result(two_objects(frame))).track_ids
    for frame in range(20, 30):
        tracker.update(result(two_objects(frame)[:1]))
    assert tracker.update(result(two_objects(30))).track_ids.tolist() == before.tolist()
    for _ in range(69):
        tracker.update(result([]))
    for frame in range(100, 102):
        new = tracker.update(result(two_objects(frame, step=0))).track_ids
    assert not set(new.tolist()) & set(before.tolist())


def test_objects_below_the_threshold_continue_a_track_and_start_none(tracker):
    for frame in range(10):
        before = tracker.update(result(two_objects(frame))).track_ids
    for frame in range(10, 20):
        tracked = tracker.update(result([*two_objects(frame), [100, 80, 120, 100]], [0.3, 0.9, 0.3]))
        assert tracked.track_ids.tolist() == [*before, -1]


def test_times_are_those_of_the_frames():
    """A second without an object ends its track, however many frames that is."""
    pytest.importorskip("trackers", reason="trackers is not installed")
    for gap, same in ((0.5, True), (3.0, False)):
        tracker, time = Tracker(30), 0.0
        for _ in range(5):
            before = tracker.update(result([[10, 20, 50, 60]]), time).track_ids
            time += 1 / 30
        for step in (gap, 1 / 30):
            time += step
            after = tracker.update(result([[10, 20, 50, 60]]), time).track_ids
        assert (after.tolist() == before.tolist()) == same


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_slow_videos_have_tracks(rate):
    pytest.importorskip("trackers", reason="trackers is not installed")
    tracker = Tracker(rate)
    ids = [tracker.update(result(two_objects(0)), frame / rate).track_ids.tolist() for frame in range(4)]
    assert ids[1] == ids[2] == ids[3] and min(ids[1]) >= 0


def test_masks_and_segments_stay_with_their_object(tracker):
    first = result(two_objects(0))
    first.detections.masks = np.zeros((2, *SIZE), bool)
    first.detections.masks[1] = True
    for _ in range(2):
        tracked = tracker.update(first)
    assert tracked.masks[1].all() and not tracked.masks[0].any() and tracked.image is first.image
    assert tracked[1].track_ids.tolist() == tracked.track_ids[1:].tolist()
    assert tracked.filter(0.95).track_ids.tolist() == []


def test_track_ids_are_in_the_json_and_absent_without_a_track():
    plain = result([[10, 20, 50, 60], [60, 20, 90, 60]])
    assert all("track_id" not in annotation for annotation in plain.to_coco())
    plain.detections.track_ids = np.array([7, -1])
    assert [annotation.get("track_id") for annotation in plain.to_coco()] == [7, None]


def test_drawings_have_the_color_and_number_of_the_track():
    def drawing(track_ids, classes):
        found = result([[20, 60, 120, 160], [160, 60, 260, 160]], classes=classes)
        found.detections.track_ids = None if track_ids is None else np.array(track_ids)
        return np.asarray(Result(noise(*SIZE), {"instances": found.detections}, CLASSES).draw())

    assert np.array_equal(drawing([-1, -1], [0, 1]), drawing(None, [0, 1]))
    one, other = drawing([3, 5], [0, 1]), drawing([3, 5], [1, 1])
    assert np.array_equal(one[-60:], other[-60:])  # where there are no labels, the class does not matter
    assert not np.array_equal(one, other)  # its name does
    swapped = drawing([5, 3], [0, 1])
    height, width = one.shape[:2]
    line = round(0.7 * height), [round(x * width / SIZE[1]) for x in (20, 160)]
    colors = one[line[0], line[1]], swapped[line[0], line[1]]
    assert np.array_equal(colors[0], colors[1][::-1]) and not np.array_equal(colors[0], colors[1])


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(TrackerError, match=r"pip install 'halodet\[video\]'"):
        Tracker(30)
