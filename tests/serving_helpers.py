"""A fixed predictor, and the server of its detector on a free port."""

from __future__ import annotations

import http.client
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from halodet.inference import Detections
from halodet.inference.base_predictor import BasePredictor
from halodet.inference.postprocessing import combine_panoptic
from halodet.serving.detector import Detector
from halodet.serving.main import make_app

import numpy as np
from PIL import Image

PANOPTIC = {"overlap_threshold": 0.5, "stuff_area_limit": 1, "instances_confidence_threshold": 0.05}


class FixedPredictor(BasePredictor):
    """Finds a dog with a hole in its mask at score 0.9, a dog in two parts at 0.6 and a cat at 0.4; counts its calls.

    Attributes:
        calls: sizes of the images.
        most_at_once: maximum number of calls at a time.
        gate: calls wait until it is set.
        error: exception to raise.
    """

    classes = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    stuff_classes: list[str] = []

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.most_at_once, self._running, self._lock = 0, 0, threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def predict(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            self.calls.append((height, width))
        assert self.gate.wait(20)
        with self._lock:
            self._running -= 1
        if self.error is not None:
            raise self.error
        masks = np.zeros((3, height, width), bool)
        masks[0, 1:12, 2:20], masks[0, 4:8, 6:11] = True, False
        masks[1, 2:5, 22:26] = masks[1, 5:9, 26:30] = True
        masks[2, 14:18, 3:9] = True
        boxes = np.array([[2, 1, 20, 12], [22, 2, 30, 9], [3, 14, 9, 18]], np.float32)
        scores = np.array([0.9, 0.6, 0.4], np.float32)
        return {"instances": Detections((height, width), boxes, scores, np.array([1, 1, 0]), masks)}


class PanopticPredictor(FixedPredictor):
    """Finds a dog in grass; with ``panoptic``, the segments of all objects in grass."""

    stuff_classes = ["things", "grass"]

    def predict(self, image: np.ndarray) -> dict[str, Any]:
        found = super().predict(image)["instances"]
        shape = image.shape[:2]
        segments = np.ones(shape, np.int32)
        segments[:10] = 2
        infos = [
            {"id": 2, "isthing": True, "score": 0.9, "category_id": 1, "instance_id": 0},
            {"id": 1, "isthing": False, "category_id": 1, "area": int((segments == 1).sum())},
        ]
        labels = np.ones(shape, np.int64)
        combined = (segments, infos) if self.panoptic is None else combine_panoptic(found, labels, **self.panoptic)
        return {"instances": found, "sem_seg": labels, "panoptic_seg": combined}


class Answer(NamedTuple):
    """Status and body of an answer."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message: one sentence and perhaps a fix, on one line."""
        message = self.json["error"]
        assert list(self.json) == ["error"] and "\n" not in message and message.endswith((".", "docs."))
        return message


def detector_of(predictor: BasePredictor, max_pixels: int = 1_000_000) -> Detector:
    """Return the detector with the smallest threshold 0.05 and the default threshold 0.5."""
    return Detector(predictor, "fixed", min_threshold=0.05, score_threshold=0.5, max_pixels=max_pixels)


@contextmanager
def serve(predictor: BasePredictor, folder: str | None = None, **limits: Any) -> Iterator[int]:
    """Serve the detector of a predictor, with the page if there is a folder; yields the port."""
    from halodet.serving.web_server import listen, make_server

    bound, uploads = listen("127.0.0.1", 0), os.environ.get("GRADIO_TEMP_DIR")
    server = make_server(make_app(detector_of(predictor), folder, **limits), limits.get("seconds", 30.0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
        if uploads is not None:  # that of another server, which continues
            os.environ["GRADIO_TEMP_DIR"] = uploads
        assert not thread.is_alive()


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """Send one request; a dict is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    if isinstance(body, dict | list):
        body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, response.read())
    finally:
        connection.close()


def multipart(content: bytes, name: str = "photo.png", **fields: str) -> tuple[bytes, str]:
    """Return the body of a form with a file, and its content type."""
    parts = [f'name="{key}"\r\n\r\n{value}'.encode() for key, value in fields.items()]
    parts.append(f'name="file"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'.encode() + content)
    body = b"".join(b"--limit\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    return body + b"--limit--\r\n", "multipart/form-data; boundary=limit"


def post(port: int, content: bytes, name: str = "photo.png", **fields: str) -> Answer:
    """Post an image as a form."""
    body, kind = multipart(content, name, **fields)
    return ask(port, "POST", "/predict", body, Content_Type=kind)


def image_file(width: int = 40, height: int = 30, kind: str = "png") -> bytes:
    """Return an image file of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait until a condition becomes true, at most 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)
