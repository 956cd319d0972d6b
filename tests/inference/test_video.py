"""Videos and cameras: which frames are read, what is written, and the exit codes and messages of tools/demo.py."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import wave
import weakref
from fractions import Fraction

from halodet.errors import ImageError
from halodet.inference import Detections
from halodet.inference.video import draw_video, output_path
from halodet.inference.video_errors import VideoError
from halodet.inference.video_reader import Frame, VideoReader, _Clock
from halodet.inference.video_writer import VideoWriter, part_name

import cv2
import exported_models
import numpy as np
import pycocotools.mask as mask_util
import pytest
from helpers import ROOT, load_tool

av = pytest.importorskip("av", reason="av is not installed")

BLUE, WIDTH, HEIGHT = (255, 0, 0), 96, 64


class SquarePredictor:
    """Finds the bright square of each image; remembers the sizes of its batches."""

    classes = [{"id": 17, "name": "square"}]
    stuff_classes = []

    def __init__(self):
        self.batches = []

    def predict(self, image):
        return self.predict_batch([image])[0]

    def predict_batch(self, images):
        self.batches.append(len(images))
        return [{"instances": find_square(image)} for image in images]


def find_square(image):
    mask = image.min(axis=2) > 128
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    boxes = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]] if len(rows) else np.zeros((0, 4))
    count = len(boxes)
    scores, classes = np.full(count, 0.9, np.float32), np.zeros(count, int)
    return Detections(image.shape[:2], np.array(boxes, np.float32), scores, classes, mask[None][:count])


def picture(index, width=WIDTH, height=HEIGHT):
    """A black image with a blue top left corner and a white square of 16 pixels that moves right, BGR."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:16, :16] = BLUE
    image[32:48, 2 * index % 64 : 2 * index % 64 + 16] = 255
    return image


def write_video(path, *, times=range(12), rate=25, size=(WIDTH, HEIGHT), pix_fmt="yuv420p", sar=Fraction(1), **options):
    """Write an H.264 video of :func:`picture`, with time stamps in units of 1/rate seconds."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 8, 0
        stream.codec_context.sample_aspect_ratio = sar
        for index, pts in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="bgr24")
            frame.pts, frame.time_base = pts, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read(path):
    """Return the frames of a video."""
    with VideoReader(path) as reader:
        return list(reader)


def lines(path):
    """Return the records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def demo(monkeypatch):
    """Return main of tools/demo.py with a fixed predictor, and that predictor."""
    tool, predictor = load_tool("demo"), SquarePredictor()
    monkeypatch.setattr(tool, "load_detector", lambda args, score_threshold: predictor)

    def main(*words):
        return tool.main(["--model", "fixed", *map(str, words)])

    main.predictor = predictor
    return main


def test_a_drawn_video_and_the_detections_of_each_frame(demo, tmp_path, capsys):
    video = write_video(tmp_path / "a.mp4", times=range(40))
    assert demo("--video", video, "--output", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.mp4", "a.jsonl"}
    printed = capsys.readouterr()
    assert "40 frames" in printed.out and "40/40" in printed.err
    records = lines(tmp_path / "out" / "a.jsonl")
    assert [record["frame"] for record in records] == list(range(40))
    assert [record["time"] for record in records] == pytest.approx([k / 25 for k in range(40)], abs=1e-6)
    for index, record in enumerate(records):
        (found,) = record["detections"]
        assert (record["width"], record["height"]) == (WIDTH, HEIGHT) and found["image_id"] == index
        assert found["bbox"] == pytest.approx([2 * index % 64, 32, 16, 16], abs=1)
        assert (found["category_id"], found["category_name"]) == (17, "square") and "track_id" not in found
        assert mask_util.decode(found["segmentation"]).sum() == found["area"]
    data = (tmp_path / "out" / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat") and b"moof" not in data
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 25 and stream.frames == 40 and stream.start_time == 0
    drawn = read(tmp_path / "out" / "a.mp4")
    assert drawn[0].image.shape == (4 * HEIGHT, 4 * WIDTH, 3)  # as drawings of small images
    for frame in drawn[::13]:
        left = 4 * (2 * frame.index % 64)
        assert frame.image[30, 20] == pytest.approx(BLUE, abs=12)  # where nothing is drawn
        outline = frame.image[120:200, left : left + 64].astype(int)
        assert (outline.max(axis=2) - outline.min(axis=2) > 60).any()  # the white square has the color of its class


def test_variable_frame_rates_keep_their_time_stamps(demo, tmp_path):
    times = [0, 100, 130, 400, 1000, 1001, 2500, 2600]
    video = write_video(tmp_path / "a.mkv", times=times, rate=1000)
    assert demo("--video", video, "--output-video", tmp_path / "b.mp4") == 0
    expected = [k / 1000 for k in times]
    assert [record["time"] for record in lines(tmp_path / "b.jsonl")] == expected
    assert [frame.time for frame in read(tmp_path / "b.mp4")] == expected


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_video_that_starts_late_is_complete(demo, tmp_path, name):
    video = write_video(tmp_path / name, times=range(200, 220))
    assert demo("--video", video, "--output", tmp_path / "out") == 0
    times = [record["time"] for record in lines(tmp_path / "out" / "a.jsonl")]
    assert times == pytest.approx([k / 25 for k in range(20)], abs=1e-3)


@pytest.mark.parametrize(
    ("matrix", "corner"), [((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0))]
)
def test_rotated_videos_are_drawn_upright(demo, tmp_path, matrix, corner):
    """The matrix of the track header: a, b, c, d of x' = ax + cy, y' = bx + dy."""
    video = write_video(tmp_path / "a.mp4")
    a, b, c, d = (int.to_bytes(k * 65536, 4, "big", signed=True) for k in matrix)
    zero, one = bytes(4), int.to_bytes(65536, 4, "big")
    before, after = video.read_bytes().rsplit(one + zero * 3 + one + zero * 3, 1)
    video.write_bytes(before + a + b + zero + c + d + zero * 3 + after)
    assert demo("--video", video, "--output", tmp_path / "out") == 0
    record = lines(tmp_path / "out" / "a.jsonl")[0]
    assert (record["width"], record["height"]) == ((WIDTH, HEIGHT) if matrix[0] else (HEIGHT, WIDTH))
    for file in (video, tmp_path / "out" / "a.mp4"):
        image = read(file)[0].image
        assert image.shape[:2] == (image.shape[0], image.shape[0] * record["width"] // record["height"])
        blue = np.abs(image.astype(int) - BLUE).max(axis=2) < 40
        y, x = (8 * image.shape[0] // record["height"] * (1 + 2 * k) for k in corner)
        assert blue[y, x] and blue.mean() == pytest.approx(256 / (WIDTH * HEIGHT), rel=0.2)


def test_odd_sizes_keep_their_pixels(demo, tmp_path):
    video = write_video(tmp_path / "a.mkv", size=(401, 321), pix_fmt="yuv444p")
    assert demo("--video", video, "--output", tmp_path) == 0
    image = read(tmp_path / "a.mp4")[0].image
    assert image.shape == (322, 402, 3) and image[8, 8] == pytest.approx(BLUE, abs=12)
    record = lines(tmp_path / "a.jsonl")[0]
    assert (record["width"], record["height"]) == (401, 321)


def test_pixels_are_made_square(tmp_path):
    for sar, shape in ((Fraction(4, 3), (64, 128, 3)), (Fraction(1, 2), (128, 96, 3))):
        assert read(write_video(tmp_path / "a.mp4", sar=sar))[0].image.shape == shape


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_truncated_video_keeps_what_was_read(demo, tmp_path, capsys, name):
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    video = write_video(tmp_path / name, times=range(100), **options)
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10])
    assert demo("--video", video, "--output", tmp_path / "out", "--batch-size", 4) == 1
    records, drawn = lines(tmp_path / "out" / "a.jsonl"), read(tmp_path / "out" / "a.mp4")
    assert len(records) == len(drawn) and 20 < len(records) < 80
    printed = capsys.readouterr().err.splitlines()[-1]
    missing = 4 - 1 / 25 - records[-1]["time"]
    assert f"frame {len(records) - 1} at {records[-1]['time']:.2f} s; {missing:.2f} s are missing" in printed


def test_a_damaged_video_is_drawn_to_its_end(demo, tmp_path, capsys):
    video = write_video(tmp_path / "a.mp4", times=range(60))
    with av.open(str(video)) as container:
        position = [packet.pos for packet in container.demux(video=0)][30]
    with open(video, "r+b") as file:
        file.seek(position)
        file.write(b"\xff" * 16)
    assert demo("--video", video, "--output", tmp_path / "out") == 1
    records = lines(tmp_path / "out" / "a.jsonl")
    assert 50 < len(records) < 60 and records[-1]["time"] == pytest.approx(59 / 25)
    assert "is damaged" in capsys.readouterr().err.splitlines()[-1]


def mpegts(tmp_path):
    return write_video(tmp_path / "a.ts").read_bytes(), [k / 25 for k in range(12)]


def y4m(tmp_path):
    header = f"YUV4MPEG2 W{WIDTH} H{HEIGHT} F10:1 Ip A1:1 C420jpeg\n".encode()
    images = (cv2.cvtColor(picture(k), cv2.COLOR_BGR2YUV_I420).tobytes() for k in range(12))
    return header + b"".join(b"FRAME\n" + image for image in images), [k / 10 for k in range(12)]


@pytest.mark.parametrize("source", [mpegts, y4m])
def test_frames_from_a_pipe(demo, tmp_path, source):
    data, times = source(tmp_path)
    stdin, (reading, writing) = os.dup(0), os.pipe()

    def feed():
        with open(writing, "wb") as pipe:
            pipe.write(data)

    feeder = threading.Thread(target=feed)
    try:
        os.dup2(reading, 0)
        feeder.start()
        assert demo("--video", "-", "--output", tmp_path) == 0
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(reading)
        feeder.join()
    assert [record["time"] for record in lines(tmp_path / "stdin.jsonl")] == pytest.approx(times)
    assert [frame.time for frame in read(tmp_path / "stdin.mp4")] == pytest.approx(times)


def audio(path):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))


def unknown_codec(path):
    data = write_video(path).read_bytes()
    path.write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_XXXXX/XXX/XXX"))


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("none.mp4", None, "none.mp4 is invalid"),
        ("text.txt", lambda path: path.write_text("words\n" * 99), "no video stream"),
        ("text.mp4", lambda path: path.write_text("words\n" * 99), "expected a video"),
        ("audio.wav", audio, "no video stream"),
        ("empty.mp4", lambda path: path.touch(), "it is empty"),
        ("folder", lambda path: path.mkdir(), "folder is invalid"),
        ("codec.mkv", unknown_codec, "no decoder"),
    ],
)
def test_what_is_no_video_is_named(demo, tmp_path, capsys, name, make, reason):
    if make is not None:
        make(tmp_path / name)
    assert demo("--video", tmp_path / name, "--output", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert reason in printed.err and name in printed.err and "Fix:" in printed.err and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--output-video", "none/b.mp4"], "--output-video none/b.mp4 is invalid: its folder"),
        (["--output-video", "b.avi"], "--output-video b.avi is invalid: expected"),
        (["--output-video", "a.mp4"], "--output-video a.mp4 is invalid: it would overwrite the input"),
        (["--output", "."], "it would overwrite the input"),
        ([], "--output DIR"),
    ],
)
def test_invalid_outputs(demo, tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    data = write_video(tmp_path / "a.mp4").read_bytes()
    assert demo("--video", "a.mp4", *words) == 2
    printed = capsys.readouterr()
    assert reason in printed.err and "Fix:" in printed.err and printed.err.count("\n") == 1
    assert os.listdir() == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == data


def test_a_url_of_a_file_is_that_file(demo, tmp_path, monkeypatch, capsys):
    data = write_video(tmp_path / "a b.mp4").read_bytes()
    url = (tmp_path / "a b.mp4").as_uri()
    assert "%20" in url and demo("--video", url, "--output", tmp_path) == 2
    assert "overwrite the input" in capsys.readouterr().err and (tmp_path / "a b.mp4").read_bytes() == data
    assert demo("--video", url, "--output", tmp_path / "out") == 0
    assert len(read(tmp_path / "out" / "a b.mp4")) == 12


def test_a_stdin_that_is_closed_is_named(tmp_path):
    code = "from halodet.inference.video_reader import VideoReader\nVideoReader('-')"
    command = f"exec {shlex.quote(sys.executable)} -W ignore -c {shlex.quote(code)} <&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "VideoError: stdin is invalid" in done.stderr


def test_a_gap_that_mp4_cannot_hold_is_named(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", Fraction(10), Fraction(1, 90_000)) as writer:
        for pts in (0, 9000):
            writer.write(picture(0), pts)
        with pytest.raises(VideoError, match="7.0 hours"):
            writer.write(picture(0), 9000 + 7 * 3600 * 90_000)
    assert writer.file == tmp_path / "a.mp4" and len(read(tmp_path / "a.mp4")) == 2


def test_the_video_of_a_killed_run_is_not_overwritten_by_its_drawing(demo, tmp_path, capsys):
    video = write_video(part_name(tmp_path / "a.mp4"))
    assert demo("--video", video, "--output-video", tmp_path / "a.mp4") == 2
    assert "overwrite the input" in capsys.readouterr().err


def test_flags_of_images_and_of_videos(demo, tmp_path, capsys):
    for words, reason in (
        (["--input", "a.png"], "required: --output"),
        (["--input", "a.png", "--output", "b", "--track"], "--track"),
        (["--input", "a.png", "--output", "b", "--output-video", "c.mp4"], "--output-video"),
        (["--video", "a.mp4", "--absolute-paths"], "--absolute-paths"),
        (["--video", "a.mp4", "--output", "b", "--output-video", "c.mp4"], "--output-video"),
        (["--video", "a.mp4", "--webcam"], "--webcam"),
        ([], "--video"),
    ):
        with pytest.raises(SystemExit) as stopped:
            demo(*words)
        assert stopped.value.code == 2 and reason in capsys.readouterr().err
    # The flags of Detectron2's demo.
    assert demo("--video-input", write_video(tmp_path / "a.mkv"), "--output", tmp_path / "b.mp4") == 0
    assert len(lines(tmp_path / "b.jsonl")) == 12


def test_missing_packages_and_encoders_are_named(demo, tmp_path, monkeypatch, capsys):
    video = write_video(tmp_path / "a.mkv")
    with monkeypatch.context() as patched:
        patched.setattr("halodet.inference.video_writer._ENCODERS", ("none",))
        assert demo("--video", video, "--output", tmp_path / "out") == 2
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "av", None)
        assert demo("--video", video, "--output", tmp_path / "out") == 2
        patched.undo()
        patched.setitem(sys.modules, "trackers", None)
        assert demo("--video", video, "--output", tmp_path / "out", "--track") == 2
    encoder, package, tracker = capsys.readouterr().err.splitlines()
    assert "H.264" in encoder and all("pip install 'halodet[video]'" in line for line in (package, tracker))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch_size", [2, 5, 50])
def test_results_do_not_depend_on_the_batch_size(demo, tmp_path, batch_size):
    video = write_video(tmp_path / "a.mkv", times=range(23))
    for size in (1, batch_size):
        demo.predictor.batches.clear()
        assert demo("--video", video, "--output", tmp_path / str(size), "--batch-size", size) == 0
        assert max(demo.predictor.batches) == min(size, 23) and sum(demo.predictor.batches) == 23
    assert lines(tmp_path / "1" / "a.jsonl") == lines(tmp_path / str(batch_size) / "a.jsonl")


def test_ids_of_tracks_are_in_the_json_and_times_reach_the_tracker(demo, tmp_path):
    pytest.importorskip("trackers", reason="trackers is not installed")
    times = [*range(0, 500, 40), *range(5000, 5500, 40)]
    video = write_video(tmp_path / "a.mkv", times=times, rate=1000)
    assert demo("--video", video, "--output", tmp_path, "--track") == 0
    ids = [record["detections"][0].get("track_id") for record in lines(tmp_path / "a.jsonl")]
    first, second = ids[:13], ids[13:]
    assert first[0] is None and second[0] is None
    assert len(set(first[1:])) == len(set(second[1:])) == 1 and first[1] != second[1] != None  # noqa: E711


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_playable_video(demo, tmp_path, capsys, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell

    def interrupt(images):
        if len(demo.predictor.batches) == 9:
            os.kill(os.getpid(), number)
            time.sleep(10)
        return SquarePredictor.predict_batch(demo.predictor, images)

    demo.predictor.predict_batch = interrupt
    assert demo("--video", write_video(tmp_path / "a.mkv", times=range(40)), "--output", tmp_path) == 130
    assert "9 frames" in capsys.readouterr().out
    assert len(lines(tmp_path / "a.jsonl")) == len(read(tmp_path / "a.mp4")) == 9
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.mkv", "a.mp4"]


def test_a_second_ctrl_c_leaves_the_part_that_is_complete(demo, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "_copy", interrupt)  # while the index is moved to the front
    assert demo("--video", write_video(tmp_path / "a.mkv"), "--output", tmp_path) == 130
    assert "12 frames drawn" in (printed := capsys.readouterr().out) and "a.part.mp4" in printed
    assert len(lines(tmp_path / "a.jsonl")) == len(read(tmp_path / "a.part.mp4")) == 12
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.mkv", "a.part.mp4"]


@pytest.mark.parametrize(("error", "code"), [(ImageError("too large."), 2), (ZeroDivisionError(), None)])
def test_an_error_of_the_model_keeps_the_frames_before(demo, tmp_path, capsys, error, code):
    def fail(images):
        if len(demo.predictor.batches) == 9:
            raise error
        return SquarePredictor.predict_batch(demo.predictor, images)

    demo.predictor.predict_batch = fail
    video = write_video(tmp_path / "a.mkv", times=range(40))
    if code is None:
        with pytest.raises(ZeroDivisionError):
            demo("--video", video, "--output", tmp_path)
    else:
        assert demo("--video", video, "--output", tmp_path) == code
        assert "too large." in capsys.readouterr().err
    assert len(lines(tmp_path / "a.jsonl")) == len(read(tmp_path / "a.mp4")) == 9


def test_a_full_disk_is_reported_once_and_keeps_what_is_written(demo, tmp_path, monkeypatch, capsys):
    write, calls = VideoWriter.write, []

    def fail(self, image, pts):
        calls.append(pts)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        write(self, image, pts)

    monkeypatch.setattr(VideoWriter, "write", fail)
    assert demo("--video", write_video(tmp_path / "a.mkv", times=range(40)), "--output", tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err.count("No space left on device") == 1 and len(calls) == 6
    assert f"5 frames drawn, 0.16 s: {tmp_path / 'a.mp4'}" in printed.out
    assert len(lines(tmp_path / "a.jsonl")) == len(read(tmp_path / "a.mp4")) == 5


def test_without_frames_an_earlier_result_is_kept(demo, tmp_path):
    def fail(images):
        raise ImageError("too large.")

    demo.predictor.predict_batch = fail
    for name in ("a.mp4", "a.jsonl"):
        (tmp_path / name).write_text("earlier")
    assert demo("--video", write_video(tmp_path / "a.mkv"), "--output", tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.mkv", "a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == (tmp_path / "a.jsonl").read_text() == "earlier"


def test_a_killed_writer_leaves_the_fragments_before(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", Fraction(10), Fraction(1, 10))
    for index in range(90):
        writer.write(picture(index, 320, 240), index)
    found = read(part_name(tmp_path / "a.mp4"))
    assert len(found) >= 40 and [frame.index for frame in found] == list(range(len(found)))
    assert not (tmp_path / "a.mp4").exists()
    writer.close()
    assert os.listdir(tmp_path) == ["a.mp4"] and len(read(tmp_path / "a.mp4")) == 90


class Source:
    """Frames without a file; counts those in memory."""

    name = stem = "source"
    path, is_live, frame_rate, time_base = None, False, Fraction(10), Fraction(1, 10)

    def __init__(self, num_frames):
        self.num_frames, self.alive, self.most, self.closed = num_frames, weakref.WeakSet(), 0, False

    def __iter__(self):
        for index in range(self.num_frames):
            frame = Frame(index, index / 10, index, picture(index))
            self.alive.add(_Key(frame))
            self.most = max(self.most, len(self.alive))
            yield frame
            del frame

    def close(self):
        self.closed = True


class _Key:
    """Hashable handle that lives as long as a frame."""

    def __init__(self, frame):
        frame.key = self


def test_few_frames_are_in_memory_and_they_overlap(tmp_path):
    source = Source(60)
    assert draw_video(SquarePredictor(), source, str(tmp_path / "a.mp4"), threshold=0.5, batch_size=4) == 0
    assert 8 <= source.most <= 30 and source.closed
    assert [record["frame"] for record in lines(tmp_path / "a.jsonl")] == list(range(60))


class Capture:
    """Camera of four frames."""

    def __init__(self, number):
        self.number, self.index = number, 0

    def isOpened(self):
        return self.number == 3

    def get(self, key):
        return 0.0

    def read(self):
        self.index += 1
        time.sleep(0.05)
        return self.index <= 4, picture(self.index)

    def release(self):
        pass


def test_a_camera_is_drawn_until_it_ends(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    assert demo("--webcam", 3, "--output", tmp_path / "out") == 1
    assert "camera 3" in capsys.readouterr().err
    times = [record["time"] for record in lines(tmp_path / "out" / "webcam3.jsonl")]
    assert 1 <= len(times) <= 4 and (np.diff(times) >= 0.04).all()  # a slow model skips frames
    assert [frame.time for frame in read(tmp_path / "out" / "webcam3.mp4")] == pytest.approx(times, abs=1e-4)


@pytest.mark.parametrize("number", [97, -1, 3_000_000_000])
def test_a_camera_that_is_not_there_is_named(demo, tmp_path, capfd, number):
    assert demo(f"--webcam={number}", "--output", tmp_path / "out") == 2
    printed = capfd.readouterr()
    assert f"--webcam {number} is invalid" in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_window_stops_at_q(demo, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "currentUIFramework", lambda: "QT", raising=False)
    for name in ("namedWindow", "destroyWindow", "resizeWindow"):
        monkeypatch.setattr(cv2, name, lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append((threading.current_thread(), image)))
    monkeypatch.setattr(cv2, "waitKey", lambda _: ord("q") if len(shown) == 5 else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1.0)
    monkeypatch.chdir(tmp_path)
    assert demo("--video", write_video(tmp_path / "a.mkv", times=range(40))) == 0
    assert 5 <= len(shown) < 12 and {thread for thread, _ in shown} == {threading.main_thread()}
    assert shown[0][1].shape == (4 * HEIGHT, 4 * WIDTH, 3) and os.listdir() == ["a.mkv"]


def test_time_stamps_are_increasing():
    clock = _Clock(distance=40, second=1000)
    assert [clock.next(stamp) for stamp in (500, 540, 540, 530, 600)] == [0, 40, 41, 42, 100]
    assert [clock.next(stamp) for stamp in (None, None, 700)] == [140, 180, 200]
    assert [clock.next(stamp) for stamp in (10_500, 0, 40)] == [10_000, 10_040, 10_080]  # joined recordings
    clock = _Clock(distance=40, second=1000)  # short ones
    assert [clock.next(stamp) for stamp in (500, 540, 580, 620, 500, 540)] == [0, 40, 80, 120, 160, 200]
    clock = _Clock(distance=40, second=1000)
    assert [clock.next(None) for _ in range(3)] == [0, 40, 80]


def test_the_name_of_the_video(tmp_path):
    source = Source(0)
    assert output_path(source, None, "drawn") == os.path.join("drawn", "source.mp4")
    assert output_path(source, str(tmp_path / "b.MP4")) == str(tmp_path / "b.MP4")


def run_without(packages, code):
    """Run code in a process that cannot import the packages."""
    blocked = f"import sys\nfor name in {packages!r}.split():\n    sys.modules[name] = None\n"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    command = [sys.executable, "-c", blocked + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr


def test_inference_is_imported_without_the_packages_of_videos():
    names = "Result, Tracker, VideoReader, VideoWriter"
    # Without PyTorch too, since importing it takes seconds.
    run_without(
        "torch detectron2 av trackers supervision",
        f"import halodet.inference.video\nfrom halodet.inference import {names}",
    )


def test_an_exported_model_tracks_without_pytorch(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("trackers", reason="trackers is not installed")
    model = exported_models.write_onnx(tmp_path / "model.onnx", exported_models.metadata())
    video, out = write_video(tmp_path / "a.mkv", times=range(5)), tmp_path / "out"
    words = ["--model", str(model), "--video", str(video), "--output", str(out), "--track"]
    packages = "torch torchvision detectron2 fvcore iopath pycocotools omegaconf"
    run_without(packages, f"import demo\nassert demo.main({words}) == 0")
    found = [annotation for record in lines(out / "a.jsonl")[1:] for annotation in record["detections"]]
    assert found and all("track_id" in annotation for annotation in found)
