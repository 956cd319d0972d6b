"""Web page of a detector."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halodet.errors import HalodetError
from halodet.inference.result import Result
from halodet.serving.detector import Detector, StoredResult
from halodet.serving.page_guard import PageGuard
from halodet.serving.plain_text import plain_text
from halodet.serving.responses import detections_dataset, found_segments
from halodet.serving.short_name import short_name
from halodet.serving.video_tab import add_video_tab
from halodet.utils.io import write_json

import gradio as gr
from fastapi import FastAPI
from PIL import Image

__all__ = ["make_page", "mount_page"]

_COLUMNS = ["Class", "Score", "x", "y", "Width", "Height", "Area"]
_DATATYPES: Any = ["str", *["number"] * (len(_COLUMNS) - 1)]
_SESSIONS = 32  # results in memory
_KEPT_FOLDERS = 3  # of drawings of a client, which Gradio may not have copied yet
_STATE_SECONDS = _FILE_SECONDS = 3600
_VIEWS = 5  # drawing, summary, table and two files
_SUMMARY = re.compile(r"\d+ (object|segment)s?")
# On a telephone, the result is below the controls.
_SCROLL = """() => {
  if (innerWidth < 700) document.querySelector("#summary").scrollIntoView({block: "end", behavior: "smooth"});
}"""
_START = "Upload or paste an image, or choose an example."
# Gradio's container is otherwise as wide as the table.
_CSS = """
gradio-app, .gradio-container { max-width: 100vw !important; }
.gradio-container .main { margin: 0 auto !important; max-width: 1200px !important; }
.gradio-container .main { padding: clamp(12px, 3vw, 32px) !important; }
"""


@dataclass
class _Session:
    """What a client looks at.

    Attributes:
        result: result of the image.
        name: name of the image.
        folder: folder of the latest drawings and JSON files, which Gradio copies; it is deleted with the session.
        num_shown: number of times that the result was shown. An earlier one that ends later is outdated.
        is_replaced: whether the client has given another image.
    """

    result: StoredResult
    name: str
    folder: tempfile.TemporaryDirectory[str]
    num_shown: int = 0
    is_replaced: bool = False

    def new_folder(self, number: int) -> Path:
        """Create the folder of a drawing, and delete those that Gradio has copied."""
        folder = Path(self.folder.name)
        shutil.rmtree(folder / str(number - _KEPT_FOLDERS), ignore_errors=True)
        (folder / str(number)).mkdir()
        return folder / str(number)


def mount_page(api: FastAPI, page: gr.Blocks, folder: Path, max_bytes: int) -> None:
    """Add the page to an application, behind its other routes.

    Args:
        api: the application.
        page: the page.
        folder: ``GRADIO_TEMP_DIR``, the folder of the uploads.
        max_bytes: maximum size of this folder.
    """
    page.has_launched = True  # otherwise Gradio does not check which files of the server a request names
    gr.mount_gradio_app(
        api,
        page,
        "/",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
    )
    mounted: Any = api.router.routes[-1]
    mounted.app = PageGuard(mounted.app, folder, max_bytes)


def make_page(
    detector: Detector, folder: Path, examples: Sequence[Path], max_waiting: int, max_video_seconds: float
) -> gr.Blocks:
    """Return the page: upload an image, and look at its detections above a threshold; or a video, in a second tab.

    Moving the threshold and choosing classes filters the result that is in memory.

    Args:
        detector: the detector.
        folder: folder in which files for download are written.
        examples: image files to choose from.
        max_waiting: number of clients that may wait.
        max_video_seconds: maximum duration of a video.
    """
    names = list(dict.fromkeys([*(entry["name"] for entry in detector.classes), *detector.stuff_classes]))

    def detect(before: _Session | None, file: dict[str, Any] | None) -> list[Any]:
        """Run the model on an uploaded file, and return the session, or a message for the views."""
        if before is not None:
            before.is_replaced = True
        if file is None:
            return [None, *_nothing(_START)]
        path = Path(file["path"])  # PageGuard has checked that it is an upload
        name = Path(file.get("orig_name") or path.name).name
        try:
            result = detector.predict(detector.read(path.read_bytes(), name))
            session = _Session(result, name, tempfile.TemporaryDirectory(dir=folder))
        except HalodetError as error:
            return [None, *_nothing(f"**Error:** {plain_text(str(error))}")]
        except OSError:
            return [None, *_nothing("**Error:** the upload has expired. Fix: upload the image again.")]
        return [session, *_skip()]

    def show(session: _Session | None, threshold: Any, chosen: list[str] | None, summary: str | None) -> list[Any]:
        """Show the part of a result that the threshold and the classes select, without running the model."""
        if session is None:  # nothing was uploaded, or Gradio has deleted the session
            was_shown = _SUMMARY.fullmatch(summary or "")
            return _nothing("**Error:** the result has expired. Fix: upload the image again.") if was_shown else _skip()
        if not isinstance(threshold, int | float):  # the field is empty while a number is typed
            return _skip()
        try:
            result = session.result.filter(min(max(threshold, detector.min_threshold), 1.0), chosen or None)
        except HalodetError as error:
            return _nothing(f"**Error:** {plain_text(str(error))}")
        session.num_shown = number = session.num_shown + 1
        drawing, dataset = _write_files(result, session.name, session.new_folder(number))
        rows = _rows(result)
        count = f"{len(rows)} {'segment' if _has_segments(result) else 'object'}{'s' * (len(rows) != 1)}"
        if session.is_replaced or session.num_shown != number:
            return _skip()
        return [str(drawing), count, rows, _download(drawing), _download(dataset)]

    with gr.Blocks(
        title="halodet", analytics_enabled=False, fill_width=True, delete_cache=(600, _FILE_SECONDS)
    ) as page:
        session = gr.State(time_to_live=_STATE_SECONDS)
        gr.Markdown(f"# halodet\nModel: {plain_text(detector.name)}")
        with gr.Tabs():
            with gr.Tab("Image"):
                with gr.Row():
                    with gr.Column(min_width=300):
                        image = gr.Image(
                            type="filepath",
                            image_mode=None,
                            sources=["upload", "clipboard"],
                            label="Image",
                            height=320,
                            buttons=[],
                            elem_id="image",
                        )
                        threshold = gr.Slider(
                            detector.min_threshold, 1.0, detector.score_threshold, step=0.01, label="Score threshold"
                        )
                        chosen = gr.Dropdown(names, multiselect=True, label="Classes", info="All if none is chosen.")
                        if examples:
                            thumbnails = gr.Dataset(
                                components=[image],
                                samples=[[str(file)] for file in examples],
                                type="index",
                                label="Examples",
                                elem_id="examples",
                            )
                    with gr.Column(min_width=300):
                        drawing = gr.Image(
                            label="Detections", height=420, interactive=False, buttons=["fullscreen"], elem_id="result"
                        )
                        summary = gr.Markdown(_START, elem_id="summary")
                        with gr.Row():
                            save_drawing = gr.DownloadButton(
                                "Save picture", interactive=False, size="md", min_width=120
                            )
                            save_dataset = gr.DownloadButton("Save JSON", interactive=False, size="md", min_width=120)
                table = gr.Dataframe(
                    headers=_COLUMNS,
                    datatype=_DATATYPES,
                    interactive=False,
                    label="Detections",
                    max_height=400,
                    buttons=[],
                    elem_id="table",
                )
                views = [drawing, summary, table, save_drawing, save_dataset]
                private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": [drawing]}
                showing: dict[str, Any] = {
                    "fn": show,
                    "inputs": [session, threshold, chosen, summary],
                    "outputs": views,
                    "preprocess": False,  # Gradio would raise errors for a number that is being typed
                    "queue": False,  # other clients do not delay it
                    "show_progress": "hidden",
                    "api_visibility": "private",
                }
                # What is chosen while the model runs applies, because the result is shown by a function of its own.
                image.change(
                    detect,
                    [session, image],
                    [session, *views],
                    preprocess=False,  # Gradio would open the file
                    concurrency_limit=1,
                    **private,
                ).success(trigger_mode="multiple", **showing).then(None, js=_SCROLL, api_visibility="private")
                gr.on([threshold.change, chosen.change], trigger_mode="always_last", **showing)
                if examples:
                    thumbnails.click(lambda index: str(examples[index]), [thumbnails], [image], **private)
            with gr.Tab("Video"):
                add_video_tab(detector, folder, names, max_video_seconds)
    page.queue(max_size=max_waiting, api_open=False)
    page.state_session_capacity = _SESSIONS
    return page


def _skip() -> list[Any]:
    """Return outputs that leave the views as they are."""
    return [gr.skip() for _ in range(_VIEWS)]


def _nothing(message: Any) -> list[Any]:
    empty = gr.DownloadButton(value=None, interactive=False)
    return [None, message, [], empty, empty]


def _download(file: Path) -> Any:
    return gr.DownloadButton(value=str(file), interactive=True)


def _write_files(result: Result, name: str, folder: Path) -> tuple[Path, Path]:
    """Write the drawing and the JSON, as ``tools/demo.py`` does for an image of this name."""
    stem, suffix = Path(name).stem, Path(name).suffix
    is_kept = suffix.lower() in (".jpg", ".jpeg", ".png")
    drawing = folder / (f"{short_name(stem)}{suffix}" if is_kept else f"{short_name(name)}.png")
    result.draw().save(drawing, quality=95)
    dataset = folder / "detections.json"
    write_json(dataset, detections_dataset(result, name, drawing.name))
    return drawing, dataset


def _has_segments(result: Result) -> bool:
    return result.panoptic_seg is not None or result.sem_seg is not None


def _rows(result: Result) -> list[list[Any]]:
    """Return the rows of the table: the segments of a panoptic or semantic model, the objects of another."""
    if _has_segments(result):
        rows = []
        for segment in found_segments(result):
            image: Any = Image.fromarray(segment["mask"])
            x0, y0, x1, y1 = image.getbbox() or (0, 0, 0, 0)
            score = round(segment["score"], 3) if "score" in segment else None
            rows.append([segment["category_name"], score, x0, y0, x1 - x0, y1 - y0, segment["area"]])
        return rows
    return [
        [name, round(entry["score"], 3), *(round(value, 1) for value in entry["bbox"]), round(entry["area"])]
        for name, entry in zip(result.names, result.to_coco(), strict=True)
    ]
