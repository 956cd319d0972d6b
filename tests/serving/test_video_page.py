"""Videos of the page: playback and download in headless Chromium, limits, playlists, and sharing of the model."""

import http.client
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from fractions import Fraction
from pathlib import Path

from halodet.inference.tracking import LOW_SCORE, Tracker
from halodet.inference.video import draw_video
from halodet.inference.video_errors import VideoError
from halodet.inference.video_reader import VideoReader
from halodet.inference.video_writer import VideoWriter
from halodet.serving.detector import ModelError
from halodet.serving.fair_lock import FairLock
from halodet.serving.video_job import LimitedVideo, VideoJob, stop_jobs

import numpy as np
import pytest
from serving_helpers import (
    PANOPTIC,
    FixedPredictor,
    PanopticPredictor,
    ask,
    detector_of,
    image_file,
    multipart,
    post,
    serve,
    wait_until,
)

pytest.importorskip("av", reason="av is not installed")
PIXELS = 1_000_000
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MILLISECONDS = 60_000  # for a machine that does other things


def clip(path, frames=10, rate=10, size=(64, 48)):
    """Write a video of a square that moves."""
    with VideoWriter(path, Fraction(rate), Fraction(1, rate)) as video:
        for k in range(frames):
            image = np.zeros((size[1], size[0], 3), np.uint8)
            image[4:12, 2 * k % 32 : 2 * k % 32 + 8] = 255
            video.write(image, k)
    return path


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def job_of(path, folder, detector=None, seconds=60, threshold=0.5, **options):
    source = LimitedVideo(path, path.name, seconds, PIXELS)
    return VideoJob(detector or detector_of(FixedPredictor()), source, folder, threshold=threshold, **options)


@pytest.fixture
def folder(tmp_path):
    """Folder of the files for download, which is empty when all jobs have ended."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    yield folder
    stop_jobs()
    assert not list(folder.iterdir())


def test_the_lock_goes_to_the_thread_that_waits_longest():
    lock, order, threads = FairLock(), [], []

    def enter(number):
        with lock:
            order.append(number)

    with lock:
        for number in range(5):
            threads.append(threading.Thread(target=enter, args=[number]))
            threads[-1].start()
            while len(lock._waiting) <= number:
                time.sleep(0.001)
    with lock:  # waits behind the others
        assert order == list(range(5))
    for thread in threads:
        thread.join()
    with pytest.raises(KeyError), lock:
        raise KeyError
    with lock:
        pass


@pytest.mark.parametrize("track", [False, True])
def test_a_job_writes_what_draw_video_writes(tmp_path, folder, track):
    if track:
        pytest.importorskip("trackers", reason="trackers is not installed")
    path = clip(tmp_path / "clip.mp4")

    def tracker():
        return Tracker(10.0, score_threshold=0.7) if track else None

    class Confident(FixedPredictor):  # as tools/demo.py loads a detector
        def predict(self, image):
            found = super().predict(image)["instances"]
            return {"instances": found[found.scores >= 0.7 * LOW_SCORE]}

    assert draw_video(Confident(), VideoReader(path), str(tmp_path / "a.mp4"), threshold=0.7, tracker=tracker()) == 0
    job = job_of(path, folder, threshold=0.7, tracker=tracker())
    assert job.wait(30) and job.error is None and job.num_frames == job.total == 10 and job.seconds_left() == 0
    assert lines(job.lines) == lines(tmp_path / "a.jsonl")
    assert job.video.read_bytes() == (tmp_path / "a.mp4").read_bytes()
    assert job.video.name == "clip.mp4" and ("track_id" in lines(job.lines)[5]["detections"][0]) == track


def test_classes_and_panoptic_segments(tmp_path, folder):
    path = clip(tmp_path / "clip.mp4", 2)
    job = job_of(path, folder, threshold=0.3, names=["cat"])
    assert job.wait(30)
    assert [entry["category_name"] for entry in lines(job.lines)[0]["detections"]] == ["cat"]
    predictor = PanopticPredictor()
    predictor.panoptic = PANOPTIC
    job = job_of(path, folder, detector_of(predictor), threshold=0.5)
    assert job.wait(30) and job.error is None
    with VideoReader(job.video) as reader:  # the drawing is enlarged; the third object does not cover the grass
        frame = next(iter(reader)).image
    cat, grass = frame[16 * frame.shape[0] // 48, 6 * frame.shape[1] // 64], frame[-8, -8]
    assert np.abs(cat.astype(int) - grass).max() < 40 and grass.max() > 60


def test_videos_beyond_the_limits(tmp_path, folder):
    path = clip(tmp_path / "clip.mp4", 30)
    with pytest.raises(VideoError, match=r"clip.mp4 is invalid: it lasts 3.0 s, expected at most 2 s. Fix: "):
        LimitedVideo(path, "clip.mp4", 2, PIXELS)
    with pytest.raises(VideoError, match="64 x 48 pixels, expected at most 3,000 pixels"):
        LimitedVideo(path, "clip.mp4", 60, 3000)
    source = LimitedVideo(path, "clip.mp4", 5, PIXELS)
    source._seconds = 1  # as if the header did not say how long the video is
    job = VideoJob(detector_of(FixedPredictor()), source, folder, threshold=0.5)
    assert job.wait(30) and job.error == "clip.mp4 is longer than 1 s: the rest was skipped."
    assert job.num_frames == len(lines(job.lines)) == 15  # with half a second of tolerance
    fast = clip(tmp_path / "fast.mp4", 130, 500)
    job = job_of(fast, folder, seconds=0.5)
    assert job.wait(30) and job.error == "fast.mp4 has more than 60 frames: the rest was skipped."
    assert job.num_frames == 60


def test_files_that_are_no_videos(tmp_path):
    contents = {"empty.mp4": b"", "text.mp4": b"no video", "photo.mp4": image_file()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=f"{name} is invalid: expected an MP4, .* or Ogg video") as caught:
            LimitedVideo(tmp_path / name, name, 60, PIXELS)
        assert str(tmp_path) not in str(caught.value)


def test_a_truncated_video_keeps_what_was_done(tmp_path, folder):
    path = clip(tmp_path / "clip.mp4", 60)
    path.write_bytes(path.read_bytes()[:-300])
    job = job_of(path, folder)
    assert job.wait(30) and "clip.mp4 is cut off" in job.error and "it ends after frame" in job.error
    assert 0 < job.num_frames < 60 and len(lines(job.lines)) == job.num_frames
    with VideoReader(job.video) as reader:
        assert len(list(reader)) == job.num_frames


def test_a_model_that_fails_ends_the_video(tmp_path, folder):
    predictor = FixedPredictor()
    predictor.error = RuntimeError("secret")
    job = job_of(clip(tmp_path / "clip.mp4"), folder, detector_of(predictor))
    assert job.wait(30) and job.error == "The model failed on this image (RuntimeError)." and job.num_frames == 0
    with pytest.raises(ModelError):
        detector_of(predictor).predict_frame(np.zeros((4, 4, 3), np.uint8))


def test_an_image_waits_for_one_frame_only(tmp_path, folder):
    class Slow(FixedPredictor):
        def predict(self, image):
            time.sleep(0.05)
            return super().predict(image)

    predictor = Slow()
    detector = detector_of(predictor)
    job = job_of(clip(tmp_path / "clip.mp4", 100), folder, detector)
    wait_until(lambda: predictor.calls)
    before = len(predictor.calls)
    detector.predict(np.zeros((30, 40, 3), np.uint8))
    assert predictor.calls.index((30, 40)) <= before + 2 and predictor.most_at_once == 1
    job.release()
    job.join(20)
    assert len(predictor.calls) < 100 and not job.video.parent.exists()


def test_a_missing_package_is_one_message(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from halodet.serving.video_tab import add_video_tab

    monkeypatch.setitem(sys.modules, "av", None)
    with gradio.Blocks(analytics_enabled=False) as page:
        add_video_tab(detector_of(FixedPredictor()), tmp_path, [], 60)
    [message] = page.blocks.values()
    assert "Videos need the package av" in message.value and "halodet&#91;video&#93;" in message.value


class Client:
    """Client of the tab over HTTP.

    Attributes:
        stream: answer of the server with the events.
        progress: summaries of the video that was drawn last, while it was drawn.
    """

    def __init__(self, port):
        self.port, self.session, self.progress = port, uuid.uuid4().hex, []
        self.config = ask(port, "GET", "/config").json

    def functions(self, button):
        """Return the numbers of the functions that a button runs one after the other."""
        [button] = [c["id"] for c in self.config["components"] if c["props"].get("value") == button]
        dependencies = self.config["dependencies"]
        [first] = [d["id"] for d in dependencies if [button, "click"] in d["targets"]]
        return [first, *(d["id"] for d in dependencies if d["trigger_after"] == first)]

    def upload(self, content, name):
        body, kind = multipart(content, name)
        body = body.replace(b'name="file"', b'name="files"')
        answer = ask(self.port, "POST", "/gradio_api/upload", body, Content_Type=kind)
        assert answer.status == 200
        return answer.json[0]

    def join(self, function, data, status=200):
        """Put a function into the queue, and return its event."""
        body = {"data": data, "fn_index": function, "session_hash": self.session}
        answer = ask(self.port, "POST", "/gradio_api/queue/join", body)
        assert answer.status == status
        return answer.json.get("event_id")

    def run(self, function, data=(), status=200):
        """Run a function that is not queued."""
        body = {"data": list(data), "fn_index": function, "session_hash": self.session}
        answer = ask(self.port, "POST", "/gradio_api/run/predict", body)
        assert answer.status == status
        return answer

    def listen(self):
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        self.connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        self.stream = self.connection.getresponse()

    def detect(self, path, name, track=False, status=200):
        """Start the job of an uploaded file."""
        begin, detect = self.functions("Detect")
        self.run(begin)
        file = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        self.event = self.join(detect, [file, 0.5, [], track], status)
        self.listen()

    def stop(self):
        [stop] = self.functions("Stop")
        [summary] = self.run(stop).json["data"]
        return summary

    def result(self):
        """Wait for the end, and return the outputs (the video, the summary and the downloads), and whether it came."""
        self.progress = []
        for line in self.stream:
            event = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if event.get("event_id") != self.event:
                continue
            if event["msg"] == "process_generating":  # its later events have what changed
                changes = event["output"]["data"][1]
                self.progress += [changes] if isinstance(changes, str) else [change[2] for change in changes]
            if event["msg"] == "process_completed":
                self.connection.close()
                return event["output"]["data"], event["success"]
        raise AssertionError("the stream ended early")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Predictor, port and folder of a server."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    predictor, folder = FixedPredictor(), tmp_path_factory.mktemp("app")
    with serve(predictor, str(folder), max_bytes=500_000, max_video_seconds=5) as port:
        yield predictor, port, folder


def test_uploads_that_are_refused_over_http(server, tmp_path):
    predictor, port, folder = server
    predictor.calls.clear()
    secret = clip(tmp_path / "secret.mp4")
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {secret}\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        remote = hls.replace(str(secret).encode(), b"http://127.0.0.1:%d/a.ts" % listening.getsockname()[1])
        for content in (hls, concat, remote, concat.replace(b"file /", b"file file:///")):
            for name in ("a.m3u8", "a.mp4"):
                client = Client(port)
                client.detect(client.upload(content, name), name)
                outputs, _ = client.result()
                assert "is invalid: expected an MP4" in outputs[1]
        listening.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has connected
            listening.accept()
    assert not predictor.calls
    assert not list((folder / "downloads").iterdir())
    client = Client(port)
    client.detect(str(secret), "secret.mp4", status=403)  # a file of the server that was not uploaded
    client.connection.close()
    assert post(port, image_file()).status == 200


def test_a_client_that_disconnects_ends_its_video(server, tmp_path):
    predictor, port, folder = server
    predictor.calls.clear()
    predictor.gate.clear()
    client = Client(port)
    client.detect(client.upload(clip(tmp_path / "clip.mp4", 40).read_bytes(), "clip.mp4"), "clip.mp4")
    wait_until(lambda: predictor.calls)
    assert list((folder / "downloads").iterdir())
    client.stream.close()
    client.connection.close()
    time.sleep(1.5)  # the server notices
    predictor.gate.set()
    wait_until(lambda: not list((folder / "downloads").iterdir()))
    assert len(predictor.calls) < 40
    assert post(port, image_file()).status == 200


def test_queued_functions_are_not_run_directly(server, tmp_path):
    predictor, port, _ = server
    predictor.calls.clear()
    client = Client(port)
    file = {"path": client.upload(clip(tmp_path / "clip.mp4").read_bytes(), "clip.mp4"), "orig_name": "clip.mp4"}
    client.run(client.functions("Detect")[1], [file, 0.5, [], False], status=404)
    client.run(client.functions("Stop")[0], [{"path": str(tmp_path / "clip.mp4")}], status=403)
    assert not predictor.calls


def test_a_full_queue_refuses_no_stop(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")

    class Slow(FixedPredictor):
        def predict(self, image):
            time.sleep(0.1)
            return super().predict(image)

    predictor = Slow()
    content = clip(tmp_path / "clip.mp4", 40).read_bytes()
    (tmp_path / "app").mkdir()
    with serve(predictor, str(tmp_path / "app"), max_waiting=1) as port:
        running, waiting, refused = Client(port), Client(port), Client(port)
        predictor.gate.clear()
        running.detect(running.upload(content, "clip.mp4"), "clip.mp4")
        wait_until(lambda: predictor.calls)
        waiting.detect(waiting.upload(content, "clip.mp4"), "clip.mp4")
        refused.detect(refused.upload(content, "clip.mp4"), "clip.mp4", status=503)
        running.stop()
        waiting.stop()
        predictor.gate.set()
        assert running.result()[0][1].startswith("Stopped. ") and waiting.result()[0][1] == "Stopped."
    assert len(predictor.calls) < 40


def test_stop_keeps_the_frames_that_are_drawn(server, tmp_path):
    predictor, port, folder = server
    predictor.calls.clear()
    client, waiting = Client(port), Client(port)
    content = clip(tmp_path / "clip.mp4", 40).read_bytes()
    predictor.gate.clear()
    client.detect(client.upload(content, "clip.mp4"), "clip.mp4")
    waiting.detect(waiting.upload(content, "clip.mp4"), "clip.mp4")
    predict, predictor.predict = predictor.predict, lambda image: (time.sleep(0.1), predict(image))[1]
    try:
        predictor.gate.set()
        wait_until(lambda: len(predictor.calls) >= 8)
        assert waiting.stop() == "Stopped."
        client.stop()
        outputs, success = client.result()
    finally:
        predictor.predict = predict
    assert success and client.progress[0] == "Frame 0 of 40"
    assert re.fullmatch(r"Frame [1-9]\d* of 40, 0:0\d left", client.progress[1])
    drawn = int(outputs[1].removeprefix("Stopped. ").removesuffix(" frames drawn before."))
    assert 8 <= drawn == len(predictor.calls) < 40
    (tmp_path / "drawn.mp4").write_bytes(ask(port, "GET", f"/gradio_api/file={outputs[0]['path']}").body)
    with VideoReader(tmp_path / "drawn.mp4") as reader:
        assert len(list(reader)) == drawn
    outputs, _ = waiting.result()
    assert outputs[:2] == [None, "Stopped."] and len(predictor.calls) == drawn  # its model did not run
    waiting.stop()  # nothing runs
    waiting.detect(waiting.upload(content, "clip.mp4"), "clip.mp4")
    assert waiting.result()[0][1] == "40 frames drawn"
    wait_until(lambda: not list((folder / "downloads").iterdir()))


def test_tracking_without_its_package_is_one_message(server, tmp_path, monkeypatch):
    _, port, folder = server
    monkeypatch.setitem(sys.modules, "trackers", None)
    client = Client(port)
    path = client.upload(clip(tmp_path / "clip.mp4", 2).read_bytes(), "clip.mp4")
    client.detect(path, "clip.mp4", track=True)
    outputs, _ = client.result()
    assert "Tracking needs the package trackers" in outputs[1] and "halodet&#91;video&#93;" in outputs[1]
    assert outputs[0] is None
    wait_until(lambda: not list((folder / "downloads").iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: set CHROMIUM to its path")
def test_a_full_queue_is_said_in_the_browser(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (tmp_path / "app").mkdir()
    path, predictor = clip(tmp_path / "clip.mp4"), FixedPredictor()
    predictor.gate.clear()
    with serve(predictor, str(tmp_path / "app"), max_waiting=1) as port, sync_api.sync_playwright() as playwright:
        clients = [Client(port), Client(port)]
        for client in clients:
            client.detect(client.upload(path.read_bytes(), "clip.mp4"), "clip.mp4")
            wait_until(lambda: predictor.calls)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page()
        view.set_default_timeout(MILLISECONDS)
        view.goto(f"http://127.0.0.1:{port}")
        view.get_by_role("tab", name="Video").click()
        view.locator("#video input[type=file]").set_input_files(path)
        sync_api.expect(view.locator("#video")).to_contain_text("clip", timeout=MILLISECONDS)
        view.get_by_role("button", name="Detect").click()
        message = "Error: the server is busy. Fix: try again later."
        sync_api.expect(view.locator("#video-summary")).to_have_text(message, timeout=MILLISECONDS)
        predictor.gate.set()
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: set CHROMIUM to its path")
def test_a_video_in_the_browser(server, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    _, port, folder = server
    path, address = clip(tmp_path / "clip.mp4"), f"http://127.0.0.1:{port}"
    assert draw_video(FixedPredictor(), VideoReader(path), str(tmp_path / "drawn.mp4"), threshold=0.5) == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page()
        view.set_default_timeout(MILLISECONDS)
        requests, errors = [], []
        view.on("request", lambda request: requests.append(request.url))
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(address)
        view.get_by_role("tab", name="Video").click()
        summary = view.locator("#video-summary")

        def detect(file):
            view.locator("#video input[type=file]").set_input_files(file)
            sync_api.expect(view.locator("#video")).to_contain_text(file.stem, timeout=MILLISECONDS)
            view.get_by_role("button", name="Detect").click()

        detect(path)
        view.get_by_role("button", name="Detect").click()  # a second click changes nothing
        sync_api.expect(summary).to_have_text("10 frames drawn", timeout=MILLISECONDS)
        video = view.locator("#video-result video")
        view.wait_for_function("document.querySelector('#video-result video').readyState >= 2")
        assert video.evaluate("v => [v.duration, v.videoWidth, v.videoHeight]") == pytest.approx(
            [1.0, 256, 192], abs=0.01
        )
        video.evaluate("v => { v.muted = true; return v.play(); }")
        view.wait_for_function("document.querySelector('#video-result video').currentTime > 0.3")
        saved = {}
        for label in ("Save video", "Save JSON lines"):
            with view.expect_download() as download:
                view.get_by_role("button", name=label).click()
            saved[download.value.suggested_filename] = download.value.path().read_bytes()
        assert saved == {
            "clip.mp4": (tmp_path / "drawn.mp4").read_bytes(),
            "clip.jsonl": (tmp_path / "drawn.jsonl").read_bytes(),
        }
        view.locator("#video button[aria-label=Clear], #video button[aria-label='Remove this file']").first.click()
        detect(clip(tmp_path / "long.mp4", 60))
        message = "Error: long.mp4 is invalid: it lasts 6.0 s, expected at most 5 s. Fix: upload a shorter video."
        sync_api.expect(summary).to_have_text(message, timeout=MILLISECONDS)
        assert video.count() == 0 and not errors
        assert all(request.startswith((address, "data:", "blob:")) for request in requests)
        browser.close()
    wait_until(lambda: not list((folder / "downloads").iterdir()))
