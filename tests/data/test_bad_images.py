"""Tests of the report of skipped images."""

import json
import logging

from halodet.data.bad_images import SKIPPED_KEY, BadImageReport, Skipped, SkipTrackingLoader, TooManyBadImages, too_many
from halodet.errors import DatasetError

import pytest

BAD, WORSE = Skipped("a.jpg", "is an empty file (0 bytes)"), Skipped("b.jpg", "does not exist")
PART = Skipped("c.jpg", "bbox has no area", annotation=2)


def test_counts_add_up_and_each_file_is_logged_once(tmp_path, caplog):
    report = BadImageReport(tmp_path)
    with caplog.at_level(logging.WARNING):
        report.add(20, [BAD, PART, BAD])
        BadImageReport(tmp_path).add(20, [WORSE, BAD, PART])  # as a resumed run does
        BadImageReport(tmp_path).add(0, [BAD], evaluation=True)
    assert json.loads((tmp_path / "skipped.json").read_text()) == {
        "images_seen": 40,
        "images_skipped": 4,
        "files": [
            {"file": "a.jpg", "reason": "is an empty file (0 bytes)", "count": 3},
            {"file": "b.jpg", "reason": "does not exist", "count": 1},
        ],
        "annotations": [{"file": "c.jpg", "annotation": 2, "reason": "bbox has no area", "count": 2}],
        "evaluation": [{"file": "a.jpg", "reason": "is an empty file (0 bytes)", "count": 1}],
    }
    assert [record.message.partition(": ")[2] for record in caplog.records] == [str(r) for r in (BAD, PART, WORSE, BAD)]
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.json"]


def test_checkpoint_restores_the_training_part_only(tmp_path):
    report = BadImageReport(tmp_path)
    report.add(20, [BAD, PART])
    saved = report.training_state()
    report.add(20, [WORSE, BAD])
    report.add(0, [WORSE], evaluation=True)
    evaluated = report.read()["evaluation"]
    report.restore(saved)
    assert report.training_state() == saved and report.read()["evaluation"] == evaluated != []


def test_unreadable_report_is_replaced_with_a_warning(tmp_path, caplog):
    (tmp_path / "skipped.json").write_text('{"images_seen": 3')
    assert BadImageReport(tmp_path).add(1, [BAD])["images_seen"] == 1
    assert "skipped.json" in caplog.text


def test_failed_write_keeps_the_previous_report(tmp_path, monkeypatch):
    report = BadImageReport(tmp_path)
    report.add(5, [BAD])
    before = report.path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        report.add(5, [WORSE])
    assert report.path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["skipped.json"]


@pytest.mark.parametrize(
    ("seen", "skipped", "stops"), [(100, 9, False), (200, 10, False), (199, 10, True), (0, 0, False), (20, 20, True)]
)
def test_too_many_is_more_than_the_fraction_and_at_least_ten(tmp_path, seen, skipped, stops):
    content = BadImageReport(tmp_path).add(seen, [Skipped(f"{n}.jpg", "does not exist") for n in range(skipped)])
    problem = too_many(content, 0.05)
    assert (problem is not None) == stops
    if stops:
        assert all(part in problem for part in (f"{skipped} of {seen}", "MAX_BAD_IMAGES", "0.jpg: does not exist"))


def test_fraction_of_one_never_stops(tmp_path):
    assert too_many(BadImageReport(tmp_path).add(50, [WORSE] * 50), 1.0) is None


def test_loader_counts_samples_and_removes_their_notes():
    batches = [[{"x": 1, SKIPPED_KEY: [BAD, PART, WORSE]}, {"x": 2}], [{"x": 3}, {"x": 4}]]
    loader = SkipTrackingLoader(batches)
    seen = []
    for batch in loader:
        seen.append((batch, loader.drain()))
    assert seen == [([{"x": 1}, {"x": 2}], (4, [BAD, PART, WORSE])), ([{"x": 3}, {"x": 4}], (2, []))]


def test_message_survives_the_traceback_of_a_loader_worker():
    wrapped = "Caught TooManyBadImages in worker 0.\n  ...\nhalodet.data.bad_images.TooManyBadImages: 4 bad.\n"
    assert str(TooManyBadImages(wrapped)) == str(TooManyBadImages("4 bad.")) == "4 bad."
    assert issubclass(TooManyBadImages, DatasetError)
