"""halodet.serving.page in headless Chromium: upload, filter, download, errors, and the width of a telephone."""

import io
import json
import os
import shutil
import threading

from halodet.inference import Result
from halodet.inference.demo import draw_images

import numpy as np
import pytest
from PIL import Image
from serving_helpers import FixedPredictor, PanopticPredictor, image_file, serve, wait_until

pytest.importorskip("gradio", reason="gradio is not installed")
import halodet.serving.page as page_module

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: set CHROMIUM to its path"),
]
MILLISECONDS = 60_000  # for a machine that does other things


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The predictor of a server with the page, and its address."""
    predictor = FixedPredictor()
    with serve(predictor, str(tmp_path_factory.mktemp("app")), max_bytes=500_000) as port:
        yield predictor, f"http://127.0.0.1:{port}"


class Page:
    """Page in a browser.

    Attributes:
        view: playwright's page.
        requests: addresses that the browser asked for.
    """

    def __init__(self, browser, address, **options):
        self.view = browser.new_context(**options).new_page()
        self.view.set_default_timeout(MILLISECONDS)
        self.requests = []
        self.view.on("request", lambda request: self.requests.append(request.url))
        self.view.goto(address)

    def upload(self, content, name="photo.png"):
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.view.locator("#image input[type=file]").set_input_files(file)

    def summary(self, text):
        sync_api.expect(self.view.locator("#summary")).to_have_text(text, timeout=MILLISECONDS)

    def rows(self, count):
        rows = self.view.locator("#table .virtual-row")
        sync_api.expect(rows).to_have_count(count, timeout=MILLISECONDS)
        return [row.locator(".body-cell").all_inner_texts() for row in rows.all()]

    def shown(self):
        """Return the pixels of the drawing."""
        address = self.view.locator("#result img").get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(self.view.request.get(address).body())).convert("RGB"))

    def set_threshold(self, value):
        field = self.view.locator("input[type=number]")
        field.fill(str(value))
        field.blur()

    def save(self, label):
        with self.view.expect_download() as download:
            self.view.get_by_role("button", name=label).click()
        return download.value


def result_of(content, threshold, names=None):
    image = np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[:, :, ::-1])
    return Result(image, FixedPredictor().predict(image), FixedPredictor.classes).filter(threshold, names)


def test_upload_filter_and_download(browser, app, tmp_path):
    predictor, address = app
    content = image_file()
    page = Page(browser, address, accept_downloads=True)
    page.upload(content)
    page.summary("2 objects")
    assert [row[0] for row in page.rows(2)] == ["dog", "dog"]
    assert np.array_equal(page.shown(), np.asarray(result_of(content, 0.5).draw()))
    calls = len(predictor.calls)

    page.set_threshold(0.3)
    page.summary("3 objects")
    assert np.array_equal(page.shown(), np.asarray(result_of(content, 0.3).draw()))
    page.view.locator("input[role=listbox], input[aria-label=Classes]").first.click()
    page.view.get_by_role("option", name="cat").click()
    page.summary("1 object")
    [row] = page.rows(1)
    assert row == ["cat", "0.4", "3", "14", "6", "4", "24"]
    assert np.array_equal(page.shown(), np.asarray(result_of(content, 0.3, ["cat"]).draw()))
    page.view.keyboard.press("Escape")
    page.view.locator(".token-remove").last.click()
    page.summary("3 objects")
    assert len(predictor.calls) == calls == 1  # nothing of this ran the model

    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "photo.png").write_bytes(content)
    draw_images(FixedPredictor(), [str(tmp_path / "in" / "photo.png")], str(tmp_path / "out"), threshold=0.3)
    saved = page.save("Save JSON")
    assert saved.suggested_filename == "detections.json"
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert json.loads(saved.path().read_text()) == {**written, "info": {"root": ""}}
    picture = page.save("Save picture")
    assert picture.suggested_filename == "photo.png"
    assert picture.path().read_bytes() == (tmp_path / "out" / "photo.png").read_bytes()
    assert all(request.startswith((address, "data:", "blob:")) for request in page.requests)


def test_what_is_no_image_is_a_message_and_the_page_stays_up(browser, app):
    _, address = app
    page = Page(browser, address)
    page.upload(b"no image <b>at</b> all", "x <i>_*y.png")
    page.summary("Error: x <i>_*y.png is not an image that Pillow can read (broken header or unsupported format).")
    assert page.view.locator("#result img").count() == 0
    page.view.locator("#image button[aria-label='Remove Image'], #image button[aria-label=Clear]").first.click()
    page.summary("Upload or paste an image, or choose an example.")
    page.upload(image_file())
    page.summary("2 objects")
    assert np.array_equal(page.shown(), np.asarray(result_of(image_file(), 0.5).draw()))


def test_an_upload_that_is_too_large_changes_nothing(browser, app):
    _, address = app
    page = Page(browser, address)
    page.upload(os.urandom(600_000))
    sync_api.expect(page.view.get_by_text("too large").first).to_be_visible(timeout=MILLISECONDS)
    page.upload(image_file())
    page.summary("2 objects")


def test_what_is_chosen_while_the_model_runs_applies(browser, app):
    predictor, address = app
    page = Page(browser, address)
    predictor.gate.clear()
    calls = len(predictor.calls)
    page.upload(image_file())
    wait_until(lambda: len(predictor.calls) > calls)
    page.set_threshold(0.3)
    page.view.wait_for_timeout(500)
    predictor.gate.set()
    page.summary("3 objects")
    assert np.array_equal(page.shown(), np.asarray(result_of(image_file(), 0.3).draw()))


@pytest.mark.parametrize("replaced", [True, False])
def test_an_image_that_is_replaced_while_it_is_drawn(browser, app, monkeypatch, replaced):
    """The drawing of the first image ends after the second one was given."""
    _, address = app
    page, started, gate, draw = Page(browser, address), threading.Event(), threading.Event(), Result.draw

    def slow(result):
        if result.image.shape[0] == 48:
            started.set()
            assert gate.wait(20)
        return draw(result)

    monkeypatch.setattr(Result, "draw", slow)
    page.upload(image_file(64, 48), "a.png")
    assert started.wait(20)
    page.view.locator("#image button[aria-label='Remove Image'], #image button[aria-label=Clear]").first.click()
    start = "Upload or paste an image, or choose an example."
    if replaced:
        page.upload(image_file(40, 30), "b.png")
        page.view.wait_for_timeout(1500)
    else:
        page.view.wait_for_timeout(500)
    gate.set()
    page.view.wait_for_timeout(500)
    page.summary("2 objects" if replaced else start)
    if replaced:
        assert np.array_equal(page.shown(), np.asarray(result_of(image_file(40, 30), 0.5).draw()))
    assert page.view.locator("#result img").count() == replaced


def test_a_drawing_that_ends_later_does_not_replace_a_newer_one(browser, app, monkeypatch):
    _, address = app
    page, started, gate, draw = Page(browser, address), threading.Event(), threading.Event(), Result.draw

    def slow(result):
        if len(result) == 2:  # that of the first threshold
            started.set()
            assert gate.wait(20)
        return draw(result)

    monkeypatch.setattr(Result, "draw", slow)
    page.upload(image_file())
    assert started.wait(20)
    page.set_threshold(0.3)
    page.summary("3 objects")
    gate.set()
    page.view.wait_for_timeout(1000)
    page.summary("3 objects")
    assert len(page.rows(3)) == 3


def test_a_threshold_that_is_being_typed_is_no_error(browser, app):
    _, address = app
    page = Page(browser, address)
    page.upload(image_file())
    page.summary("2 objects")
    field = page.view.locator("input[type=number]").first
    field.click()
    for key in ("Control+a", "Backspace", "0", ".", "3"):
        page.view.keyboard.press(key)
        page.view.wait_for_timeout(300)
    page.summary("3 objects")
    assert page.view.locator(".toast-body").count() == 0


def test_a_result_that_has_expired_is_said(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_SESSIONS", 1)
    with serve(FixedPredictor(), str(tmp_path)) as port:
        first, second = (Page(browser, f"http://127.0.0.1:{port}") for _ in range(2))
        for page in (first, second):
            page.upload(image_file())
            page.summary("2 objects")
        first.set_threshold(0.3)
        first.summary("Error: the result has expired. Fix: upload the image again.")
        first.upload(image_file(64, 48))
        first.summary("3 objects")


def test_two_clients_have_their_own_results(browser, app):
    predictor, address = app
    first, second = (Page(browser, address) for _ in range(2))
    predictor.gate.clear()
    first.upload(image_file(40, 30), "a.png")
    second.upload(image_file(64, 48), "b.png")
    threading.Timer(1.0, predictor.gate.set).start()
    for page in (first, second):
        page.summary("2 objects")
    first.set_threshold(0.7)
    first.summary("1 object")
    second.set_threshold(0.3)
    second.summary("3 objects")
    assert np.array_equal(first.shown(), np.asarray(result_of(image_file(40, 30), 0.7).draw()))
    assert np.array_equal(second.shown(), np.asarray(result_of(image_file(64, 48), 0.3).draw()))
    assert predictor.most_at_once == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_needs_no_horizontal_scrolling(browser, app, scheme):
    _, address = app
    page = Page(browser, address, viewport={"width": 375, "height": 800}, color_scheme=scheme)
    page.view.locator("#examples button").first.click()  # one of the drawn examples
    page.summary("2 objects")
    assert page.view.evaluate("document.documentElement.scrollWidth") == 375
    for part in ("#result img", "#summary"):  # the page scrolls to them
        sync_api.expect(page.view.locator(part)).to_be_in_viewport(timeout=MILLISECONDS)
    background = page.view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(json.loads(background.replace("rgb(", "[").replace(")", "]"))) > 384) == (scheme == "light")


def test_segments_are_drawn_and_listed(browser, tmp_path):
    with serve(PanopticPredictor(), str(tmp_path)) as port:
        page = Page(browser, f"http://127.0.0.1:{port}")
        page.upload(image_file())
        page.summary("2 segments")
        assert [[row[0], row[-1]] for row in page.rows(2)] == [["dog", "400"], ["grass", "800"]]
        image = np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(image_file())))[:, :, ::-1])
        output = PanopticPredictor().predict(image)
        drawing = Result(image, output, PanopticPredictor.classes, PanopticPredictor.stuff_classes).filter(0.5).draw()
        assert np.array_equal(page.shown(), np.asarray(drawing))
