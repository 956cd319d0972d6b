"""halodet.serving: answers of the server, its limits, and which requests it refuses."""

import asyncio
import base64
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

from halodet.errors import ConfigError
from halodet.inference import Result
from halodet.serving import main as serving_main
from halodet.serving.examples import copy_examples
from halodet.serving.packed_masks import PackedMasks
from halodet.serving.polygons import mask_to_polygons
from halodet.utils.image_io import decode_image, read_image

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from pycocotools import mask as mask_util
from serving_helpers import (
    PANOPTIC,
    Answer,
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

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed")

MAX_BYTES = 200_000


@pytest.fixture(scope="module")
def shared():
    """Port of a server that tests share."""
    with serve(FixedPredictor(), max_bytes=MAX_BYTES, seconds=1.0) as port:
        yield port


@pytest.fixture
def predictor():
    return FixedPredictor()


def expected(threshold):
    """The result of the fixed predictor for the image of image_file()."""
    predictor = FixedPredictor()
    image = np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(image_file())))[:, :, ::-1])
    return Result(image, predictor.predict(image), predictor.classes).filter(threshold)


def rasterize(segmentation):
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, 30, 40))
    return mask_util.decode(segmentation).astype(bool)


@pytest.mark.parametrize("threshold", [0.05, 0.6, 0.61, 0.95])
def test_annotations_are_those_of_the_result(shared, threshold):
    answer = post(shared, image_file(), score_threshold=str(threshold))
    encoded = base64.b64encode(image_file()).decode()
    body = {"image": encoded, "score_threshold": threshold}
    assert answer == ask(shared, "POST", "/predict", body) and answer.status == 200
    assert answer == ask(shared, "POST", "/predict", {**body, "image": f"data:image/png;base64,{encoded}"})
    result = expected(threshold)
    assert answer.json["image"] == {"width": 40, "height": 30} and answer.json["score_threshold"] == threshold
    names = [annotation.pop("category_name") for annotation in answer.json["annotations"]]
    assert names == [] or set(names) <= {"cat", "dog"}
    found = answer.json["annotations"]
    assert [{**a, "category_name": n} for a, n in zip(result.to_coco(), result.names, strict=True)] == [
        {key: value for key, value in annotation.items() if key != "id"} for annotation in found
    ]
    assert [annotation["id"] for annotation in found] == list(range(1, len(result) + 1))


def test_the_default_threshold_and_masks(shared):
    annotations = post(shared, image_file()).json["annotations"]
    assert [entry["score"] for entry in annotations] == pytest.approx([0.9, 0.6])
    masks = expected(0.5).masks
    for form in ("rle", "polygons"):
        annotations = post(shared, image_file(), masks=form).json["annotations"]
        for annotation, mask in zip(annotations, masks, strict=True):
            assert isinstance(annotation["segmentation"], list) == (form == "polygons")
            assert np.array_equal(rasterize(annotation["segmentation"]), mask)
    assert all("segmentation" not in entry for entry in post(shared, image_file(), masks="none").json["annotations"])


def test_polygons_of_any_mask_rasterize_to_it():
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = (int(size) for size in rng.integers(1, 40, 2))
        mask = rng.random((height, width)) < rng.choice([0.1, 0.5, 0.9])
        polygons = mask_to_polygons(mask)
        assert bool(polygons) == mask.any()
        if polygons:
            found = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, height, width)))
            assert np.array_equal(found, mask)


def test_packed_masks_are_the_masks():
    masks = np.random.default_rng(0).random((5, 31, 17)) < 0.3
    masks[1] = masks[2, :4] = masks[2, 6:] = False
    packed = PackedMasks(masks)
    for item in (slice(None), slice(1, 4), np.array([4, 2]), masks[:, 0, 0], np.zeros(5, bool)):
        assert np.array_equal(packed[item], masks[item]) and packed[item].dtype == bool


def test_panoptic_segments_are_combined_for_the_threshold(monkeypatch):
    predictor = PanopticPredictor()
    monkeypatch.setattr(predictor, "panoptic", PANOPTIC)
    detector = detector_of(predictor)
    stored = detector.predict(np.zeros((30, 40, 3), np.uint8))
    high, low = stored.filter(0.95), stored.filter(0.05)
    assert [info["isthing"] for info in high.panoptic_seg[1]] == [False]
    assert (high.panoptic_seg[0] == 1).all()  # grass is below the objects that the threshold removes
    assert [info["isthing"] for info in low.panoptic_seg[1]] == [True, True, True, False]
    assert stored.filter(0.05, ["dog"]).panoptic_seg[0][15, 4] == 0  # the cat's pixels are of no class that is chosen
    monkeypatch.setattr(predictor, "panoptic", None)
    with serve(predictor) as port:
        answer = post(port, image_file(), masks="polygons").json
    segments = answer["segments"]
    assert [(s["category_name"], s["isthing"], s["area"]) for s in segments] == [
        ("dog", True, 400),
        ("grass", False, 800),
    ]
    assert [rasterize(s["segmentation"]).sum() for s in segments] == [400, 800]


def test_health_classes_and_docs(shared):
    assert ask(shared, "GET", "/health").json["status"] == "ok"
    assert ask(shared, "GET", "/classes").json == {
        "classes": FixedPredictor.classes,
        "stuff_classes": [],
        "min_score_threshold": 0.05,
        "default_score_threshold": 0.5,
    }
    document = ask(shared, "GET", "/openapi.json").json
    assert set(document["paths"]) == {"/predict", "/health", "/classes"}
    assert set(document["paths"]["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }
    page = ask(shared, "GET", "/docs").body.decode()
    assert "POST /predict" in page and "score_threshold" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.mark.parametrize("value", ["high", "", "nan", "inf", "-0.1", "1.01", "0.01", "1e999", "0x1"])
def test_invalid_thresholds(shared, value):
    answer = post(shared, image_file(), score_threshold=value)
    assert answer.status == 422 and answer.error.startswith(f"score_threshold={value} is invalid")


@pytest.mark.parametrize("value", [True, None, [0.5], {}, "high", 10**400])
def test_invalid_thresholds_in_json(shared, value):
    body = {"image": base64.b64encode(image_file()).decode(), "score_threshold": value}
    answer = ask(shared, "POST", "/predict", body)
    assert answer.status == 422 and "score_threshold" in answer.error


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width, height):
    """A small PNG file of this size: its pixels are black as far as they go."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(4_000_000), 9)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
NOT_IMAGES = {
    "empty": b"",
    "text": b"hello",
    "html": b"<html><img src=x></html>",
    "truncated_png": image_file()[:900],
    "truncated_jpeg": image_file(kind="jpeg")[:600],
    "bomb": png_bomb(60_000, 60_000),
    "too_large": png_bomb(1200, 1000),
    "eps": EPS,
}


@pytest.mark.parametrize("content", NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_what_is_no_image_is_one_message(shared, content):
    answer = post(shared, content, "some photo.png")
    assert answer.status == 422 and answer.error.startswith("some photo.png")
    assert ask(shared, "POST", "/predict", {"image": base64.b64encode(content).decode()}).status == 422
    assert ask(shared, "GET", "/health").status == 200


def test_the_size_is_checked_before_pixels_are_decoded(shared, monkeypatch):
    loaded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: loaded.append(image.size))
    assert "exceeds limit" in post(shared, png_bomb(60_000, 60_000)).error  # Pillow's own
    assert "1200 x 1000 pixels are too many: expected at most 1,000,000" in post(shared, png_bomb(1200, 1000)).error
    assert loaded == []


def test_no_decoder_that_starts_a_program_is_used(shared, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: started.append(arguments))
    assert "is not an image that Pillow can read" in post(shared, EPS).error and started == []


def test_uploads_are_decoded_as_files_are_read(tmp_path):
    for kind in ("png", "jpeg", "tiff", "webp", "gif", "bmp"):
        path = tmp_path / f"x.{kind}"
        path.write_bytes(image_file(kind=kind))
        assert np.array_equal(decode_image(path.read_bytes(), "x", 10_000), read_image(path))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"image": "***"}, 422, "not base64"),
        ({"image": "abc"}, 422, "not base64"),
        ({"image": 5}, 422, "no image"),
        ({}, 422, "no image"),
        ([1], 422, "not a JSON object"),
        ({"image": "QUJD", "masks": "png"}, 422, "masks=png is invalid: expected rle, polygons, none"),
        ({"image": "QUJD", "masks": ["rle"]}, 422, "masks="),
        ({"image": "QUJD", "path": "/etc/passwd"}, 422, "path is no setting"),
    ],
)
def test_invalid_json(shared, body, status, message):
    answer = ask(shared, "POST", "/predict", body)
    assert answer.status == status and message in answer.error


@pytest.mark.parametrize("body", [b"{", b"[" * 50_000, b"\xff\xfe", b'{"image": ' + b"9" * 10_000 + b"}"])
def test_malformed_json(shared, body):
    answer = ask(shared, "POST", "/predict", body, Content_Type="application/json")
    assert answer.status in (400, 422) and answer.error


def test_malformed_forms(shared):
    body, kind = multipart(image_file())
    for broken in (b"", b"nonsense", body[:50]):
        answer = ask(shared, "POST", "/predict", broken, Content_Type=kind)
        assert answer.status in (400, 422) and "form" in answer.error
    answer = ask(shared, "POST", "/predict", body, Content_Type="multipart/form-data")
    assert answer.status == 400 and "form" in answer.error
    assert ask(shared, "POST", "/predict", body, Content_Type="image/png").status == 415
    assert "no setting" in post(shared, image_file(), threshold="0.5").error
    assert (
        "no file"
        in ask(shared, "POST", "/predict", body.replace(b'; filename="photo.png"', b""), Content_Type=kind).error
    )


@pytest.mark.parametrize("way", ["content-length", "chunked"])
@pytest.mark.parametrize("size", [MAX_BYTES + 1, 3 * MAX_BYTES])
def test_bodies_that_are_too_large(shared, way, size):
    chunk = b"x" * 1000
    body = (chunk for _ in range(size // 1000 + 1)) if way == "chunked" else b"x" * size
    answer = ask(shared, "POST", "/predict", body, Content_Type="application/json")
    assert answer.status == 413 and f"at most {MAX_BYTES:,} bytes" in answer.error


def test_a_client_that_waits_is_refused_before_it_sends_the_body(shared):
    request = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", shared), timeout=10) as client:
        client.sendall(request.encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: x\r\nX-A: ", b"GET /hea"])
def test_clients_that_do_not_finish_their_headers_are_disconnected(shared, sent):
    with socket.create_connection(("127.0.0.1", shared), timeout=10) as client:
        client.sendall(sent)
        started = time.monotonic()
        assert client.recv(1000) == b"" and time.monotonic() - started < 5


def test_a_client_that_sends_its_body_slowly_is_refused(shared):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", shared), timeout=10) as client:
        client.sendall(head)
        answer = b""
        while not answer and time.monotonic() - started < 8:
            client.sendall(b" ")
            client.settimeout(0.2)
            try:
                answer = client.recv(1000)
            except TimeoutError:
                pass
    assert answer.startswith(b"HTTP/1.1 408") and 0.8 < time.monotonic() - started < 5
    assert ask(shared, "GET", "/health").status == 200


def test_clients_at_once_are_served_one_after_the_other(predictor):
    predictor.gate.clear()
    answers: list[Answer] = []
    with serve(predictor, max_waiting=2) as port:
        threads = [threading.Thread(target=lambda: answers.append(post(port, image_file()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: ask(port, "GET", "/health").json["waiting"] == 2)  # it answers while the model runs
        busy = post(port, image_file())
        assert busy.status == 503 and "2 requests are waiting" in busy.error
        predictor.gate.set()
        for thread in threads:
            thread.join(20)
    assert [answer.status for answer in answers] == [200] * 3 and len({answer.body for answer in answers}) == 1
    assert predictor.most_at_once == 1 and len(predictor.calls) == 3


def test_a_client_that_disconnects_leaves_the_queue(predictor):
    predictor.gate.clear()
    body, kind = multipart(image_file())
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with serve(predictor) as port:
        first, second = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        first.sendall(head.encode() + body)
        wait_until(lambda: len(predictor.calls) == 1)
        second.sendall(head.encode() + body)
        wait_until(lambda: ask(port, "GET", "/health").json["waiting"] == 1)
        second.close()
        wait_until(lambda: ask(port, "GET", "/health").json["waiting"] == 0)
        first.close()
        with socket.create_connection(("127.0.0.1", port)) as third:
            third.sendall(head.encode() + body[:100])  # and closes in the middle of the body
        predictor.gate.set()
        assert post(port, image_file()).status == 200
    assert len(predictor.calls) == 2


def test_a_model_that_fails_is_an_error_of_the_server(predictor, caplog):
    predictor.error = RuntimeError("/secret/path: out of memory")
    with serve(predictor) as port:
        answer = post(port, image_file())
        assert answer.status == 500 and answer.error == "The model failed on this image (RuntimeError)."
        assert "out of memory" in caplog.text  # it is in the log of the server only
        predictor.error = None
        assert post(port, image_file()).status == 200


TRAVERSALS = [
    "/../../../../etc/passwd",
    "/..%2f..%2f..%2fetc%2fpasswd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//etc/passwd",
    "/predict/../../etc/passwd",
    "/docs/..%5c..%5cetc%5cpasswd",
    "/static/../../etc/passwd",
    "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../../../../../../../etc/passwd",
    "/gradio_api/file=%2Fetc%2Fpasswd",
    "/gradio_api/file=http://127.0.0.1:1/",
    "/gradio_api/file=UPLOADS/../../../../../../../etc/passwd",
    "/gradio_api/file=UPLOADS/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/gradio_api/file=UPLOADS/link",
    "/gradio_api/file=UPLOADS",
    "/gradio_api/file=UPLOADS/../secret",
    "/gradio_api/file=SETUP",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=http://127.0.0.1:1/",
    "/gradio_api/proxy=/etc/passwd",
    "/gradio_api/custom_component/x/client/../../../etc/passwd",
    "/gradio_api/stream/x/y/1/playlist.m3u8",
    "/gradio_api/dev/reload",
    "/gradio_api/vibe-code",
    "/gradio_api/run-history/buckets",
    "/monitoring",
    "/pwa_icon",
    "/file=/etc/passwd",
]


def assert_is_refused(port, path):
    """Send the path as it is, without the changes that clients make."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 4"), (path, answer[:200])
    assert b"root:" not in answer and b"secret" not in answer and b"find_packages" not in answer, path


@pytest.mark.parametrize("path", TRAVERSALS)
def test_the_api_serves_no_files(shared, path):
    assert_is_refused(shared, path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Port of a server with the page, and its folder; there is a secret beside the uploads, and a link to it."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("page")
    (folder / "secret").write_text("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ)
        with serve(FixedPredictor(), str(folder), max_bytes=MAX_BYTES) as port:
            (folder / "uploads" / "link").symlink_to(folder / "secret")
            yield port, folder


def test_the_page_serves_no_files_but_uploads(page):
    port, folder = page
    for path in TRAVERSALS:
        assert_is_refused(port, path.replace("UPLOADS", f"{folder}/uploads").replace("SETUP", f"{ROOT}/setup.py"))
    body, kind = multipart(image_file())
    uploaded = ask(port, "POST", "/gradio_api/upload", body.replace(b'name="file"', b'name="files"'), Content_Type=kind)
    [path] = uploaded.json
    assert ask(port, "GET", f"/gradio_api/file={path}") == (200, image_file())
    body, kind = multipart(image_file(), "../../../../../tmp/../evil.png")
    uploaded = ask(port, "POST", "/gradio_api/upload", body.replace(b'name="file"', b'name="files"'), Content_Type=kind)
    assert os.path.realpath(uploaded.json[0]).startswith(os.path.realpath(folder / "uploads"))


def joined(port, file):
    """Send an image to the page's queue as its browser does."""
    config = ask(port, "GET", "/config").json
    [event] = [entry for entry in config["dependencies"] if len(entry["outputs"]) == 6]
    data = {"data": [file, 0.5, []], "fn_index": event["id"], "session_hash": "abc", "event_data": None}
    return ask(port, "POST", "/gradio_api/queue/join", data)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "SETUP", "http://127.0.0.1:1/x.png", "UPLOADS/../secret", "UPLOADS/link", 5, "", "a\0b"]
)
def test_the_page_reads_no_files_but_uploads(page, name):
    port, folder = page
    if isinstance(name, str):
        name = name.replace("UPLOADS", f"{folder}/uploads").replace("SETUP", f"{ROOT}/setup.py")
    for file in ({"path": name, "meta": {"_type": "gradio.FileData"}}, {"a": [{"path": name}]}):
        answer = joined(port, file)
        assert answer.status == 403 and "not uploaded" in answer.error
    assert ask(port, "GET", "/health").status == 200


def test_the_page_is_the_only_other_route(page):
    port, _ = page
    for method, path in (
        ("POST", "/gradio_api/api/detect"),
        ("POST", "/gradio_api/call/detect"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/run-history/connect"),
        ("POST", "/gradio_api/process_recording"),
        ("PUT", "/gradio_api/upload"),
        ("DELETE", "/"),
        ("OPTIONS", "/"),
    ):
        assert ask(port, method, path, b"{}", Content_Type="application/json").status == 404, path
    big = ask(port, "POST", "/gradio_api/upload", b"x" * (MAX_BYTES + 1), Content_Type="multipart/form-data")
    assert big.status == 413
    text = ask(port, "GET", "/").body.decode()
    scripts = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](https?://[^\"']+)", text)
    assert scripts == []


def test_pages_of_other_sites_are_refused(page):
    port, _ = page
    body, kind = multipart(image_file())
    for path in ("/predict", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict"):
        answer = ask(port, "POST", path, body, Content_Type=kind, Sec_Fetch_Site="cross-site")
        assert answer.status == 403 and "another site" in answer.error
    for site in ("same-origin", "same-site", "none"):
        assert ask(port, "POST", "/predict", body, Content_Type=kind, Sec_Fetch_Site=site).status == 200


def test_the_oldest_uploads_make_room(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    uploads = tmp_path / "uploads"
    files = []
    with serve(FixedPredictor(), str(tmp_path), max_bytes=10_000) as port:
        kept = {file for file in uploads.rglob("*") if file.is_file()}  # examples
        for k in range(100):
            body, kind = multipart(os.urandom(9000), f"{k}.png")
            form = body.replace(b'name="file"', b'name="files"')
            [file] = ask(port, "POST", "/gradio_api/upload", form, Content_Type=kind).json
            files.append(Path(file))
            os.utime(file, (k, k))
        left = [file.exists() for file in files]
        assert left == sorted(left) and 60 < sum(left) < 75  # 64 x 10,000 bytes, the last ones
        assert all(file.exists() for file in kept) and post(port, image_file()).status == 200


def test_examples_are_copied_to_where_they_may_be_served(tmp_path):
    for name in ("a/x.png", "b/x.png", "b/y.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(image_file())
    (tmp_path / "out").mkdir()
    copies = copy_examples(str(tmp_path / "in"), tmp_path / "out")
    assert [file.name for file in copies] == ["x.png", "x.png", "y.jpg"] and len(set(copies)) == 3
    assert all(file.read_bytes() == image_file() and file.is_relative_to(tmp_path / "out") for file in copies)


def test_a_port_in_use_and_invalid_arguments(capsys):
    from halodet.serving.web_server import listen

    with listen("127.0.0.1", 0) as bound:
        port = str(bound.getsockname()[1])
        assert serving_main.main(["--model", "none.onnx", "--api-only", "--port", port]) == 2
        assert capsys.readouterr().err == (
            f"app.py: error: --port {port} is invalid: another process uses it. "
            "Fix: use another port, or stop that process.\n"
        )
    for host in ("192.0.2.1", "a..b", "a" * 70):
        with pytest.raises(ConfigError, match=f"--host {host} "):
            listen(host, 0)
    for arguments in (
        ["--confidence-threshold", "high"],
        ["--port", "70000"],
        ["--max-upload-mb", "0"],
        ["--min-score", "0.9"],  # above the default of --confidence-threshold
    ):
        with pytest.raises(SystemExit) as stopped:
            serving_main.main(["--model", "x.onnx", *arguments])
        assert stopped.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("gradio", [], "pip install 'halodet[app]', or use --api-only"),
        ("fastapi", ["--api-only"], "pip install 'halodet[api]'"),
        ("uvicorn", [], "pip install 'halodet[app]'"),
    ],
)
def test_missing_packages(monkeypatch, capsys, missing, arguments, message):
    monkeypatch.setattr(serving_main, "is_installed", lambda name: name != missing)
    assert serving_main.main(["--model", "x.onnx", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"app.py: error: {missing} is not installed") and message in printed


def test_the_api_imports_neither_gradio_nor_torch():
    code = """
import sys
for name in ("gradio", "torch", "detectron2", "pycocotools", "fvcore", "iopath"):
    sys.modules[name] = None
import halodet.serving.main, halodet.serving.api, halodet.serving.web_server, halodet.serving.request_limits
import halodet.serving.examples, pathlib
assert len(halodet.serving.examples.draw_examples(pathlib.Path(sys.argv[1]))) == 4
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


SERVED = """
import sys
for name in ("torch", "detectron2", *(["gradio"] if "--api-only" in sys.argv else [])):
    sys.modules[name] = None
from halodet.serving import main
from halodet.serving.detector import Detector
class Predictor:
    classes, stuff_classes, panoptic = [], [], None
main._load_detector = lambda args: Detector(Predictor(), "x", min_threshold=0, score_threshold=0.5, max_pixels=9)
sys.exit(main.main(["--model", "x.onnx", "--port", "0", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("number", "words"), [(signal.SIGTERM, ["--api-only"]), (signal.SIGINT, [])])
def test_signals_end_the_server_and_remove_its_folder(tmp_path, number, words):
    if not words:
        pytest.importorskip("gradio", reason="gradio is not installed")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SERVED, *words]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=ROOT, env=environment)
    address = process.stdout.readline()
    port = int(re.search(r"http://127.0.0.1:(\d+) ", address)[1])
    assert ask(port, "GET", "/health").status == 200 and len(list(tmp_path.glob("halodet-app-*"))) == 1
    stream = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    stream.request("GET", "/gradio_api/heartbeat/x")  # as an open page does, until it is closed
    assert stream.getresponse().status == (404 if words else 200)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    stream.close()
    assert process.returncode == 0 and printed == "" and list(tmp_path.iterdir()) == []


def test_tasks_that_the_end_of_the_server_cancels_are_not_logged(caplog):
    from halodet.serving.web_server import make_server

    make_server(lambda scope, receive, send: None, 1.0)
    log = logging.getLogger("uvicorn.error")
    log.error("Traceback (most recent call last):\n  ...\nasyncio.exceptions.CancelledError")
    log.error("Exception in ASGI application", exc_info=asyncio.CancelledError())
    log.error("Exception in ASGI application", exc_info=ValueError("x"))
    assert len(caplog.records) == 1 and caplog.records[0].exc_info[0] is ValueError


def test_answers_are_strict_json(shared):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(post(shared, image_file()).body, parse_constant=refuse)
