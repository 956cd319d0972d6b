"""Tab of the page that takes a video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halodet.errors import HalodetError
from halodet.inference.tracking import Tracker
from halodet.inference.video_errors import import_av
from halodet.inference.video_writer import find_encoder
from halodet.serving.detector import Detector
from halodet.serving.plain_text import plain_text
from halodet.serving.video_job import LimitedVideo, VideoJob

import gradio as gr
from gradio.data_classes import FileData

__all__ = ["add_video_tab"]

_START = "Upload a video."
_WAITING = "Waiting for its turn."
_STOPPED = "Stopped."
_BUSY = "**Error:** the server is busy. Fix: try again later."
_RUNS = 1000  # clients of which a run is remembered
_PROGRESS_SECONDS = 0.5
# Browsers know the types of the first ones only.
_SUFFIXES = [".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv"]


@dataclass
class _Run:
    """State of one press of *Detect*, which *Stop* shares."""

    is_waiting: bool = True
    is_running: bool = False
    is_stopped: bool = False


def add_video_tab(detector: Detector, folder: Path, names: Sequence[str], max_seconds: float) -> None:
    """Add the components of the tab to the page that is being built.

    Args:
        detector: the detector.
        folder: folder in which files for download are written.
        names: names of the classes to choose from.
        max_seconds: maximum duration of a video.
    """
    try:
        import_av()
        find_encoder()
    except HalodetError as error:
        gr.Markdown(plain_text(str(error)), elem_id="video-summary")
        return

    runs: dict[str | None, _Run] = {}  # by session_hash

    def detect(
        file: dict[str, Any] | None,
        threshold: float,
        chosen: list[str],
        track: bool,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Run the model on an uploaded file; Gradio closes the generator if the client disconnects."""
        run = runs.setdefault(request.session_hash, _Run())
        run.is_waiting = False
        if file is None or run.is_stopped:
            yield _nothing(_START if file is None else _STOPPED)
            return
        if not isinstance(threshold, int | float):
            yield _nothing("**Error:** the score threshold is invalid: expected a number.")
            return
        path = Path(file["path"])  # PageGuard has checked that it is an upload
        if not path.is_file():
            yield _nothing("**Error:** the upload has expired. Fix: upload the video again.")
            return
        name = Path(file.get("orig_name") or path.name).name
        try:
            source = LimitedVideo(path, name, max_seconds, detector.max_pixels)
            try:
                tracker = Tracker(float(source.frame_rate), score_threshold=threshold) if track else None
                job = VideoJob(detector, source, folder, threshold=threshold, names=chosen or None, tracker=tracker)
            except BaseException:
                source.close()
                raise
        except HalodetError as error:
            yield _nothing(f"**Error:** {plain_text(str(error))}")
            return
        try:
            run.is_running = True
            yield _nothing(_progress(job))
            while not job.wait(_PROGRESS_SECONDS):
                if run.is_stopped:
                    job.stop()
                yield [gr.skip(), _progress(job), gr.skip(), gr.skip()]
            summary = _summary(job, run.is_stopped)
            if job.num_frames and job.video.is_file() and job.lines.is_file():
                yield [str(job.video), summary, _download(job.video), _download(job.lines)]
            else:
                yield _nothing(summary)
        finally:
            run.is_running = False
            job.release()

    def begin(request: gr.Request) -> Any:
        """Start a new run of a client, unless one is running."""
        if request.session_hash in runs and runs[request.session_hash].is_running:
            return gr.skip()
        runs.pop(request.session_hash, None)
        runs[request.session_hash] = _Run()
        if len(runs) > _RUNS:
            del runs[next(iter(runs))]
        return _WAITING

    def end(request: gr.Request) -> Any:
        """Stop a run that waits for another video, or runs; it keeps the frames that are drawn."""
        run = runs.get(request.session_hash, _Run(is_waiting=False))
        run.is_stopped = True
        return _STOPPED if run.is_waiting else gr.skip()

    with gr.Row():
        with gr.Column(min_width=300):
            # gr.Video has an editor, whose program browsers would load from another host.
            file = gr.File(label="Video", file_types=["video", *_SUFFIXES], height=160, elem_id="video")
            threshold = gr.Slider(
                detector.min_threshold, 1.0, detector.score_threshold, step=0.01, label="Score threshold"
            )
            chosen = gr.Dropdown(list(names), multiselect=True, label="Classes", info="All if none is chosen.")
            track = gr.Checkbox(label="Track objects")
            with gr.Row():
                start = gr.Button("Detect", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=120)
        with gr.Column(min_width=300):
            drawn: Any = gr.Video(label="Detections", height=420, interactive=False, buttons=[], elem_id="video-result")
            # Gradio would run ffprobe on the file, if that is installed. A subclass would make it write a .pyi file.
            drawn.postprocess = _as_it_is
            summary = gr.Markdown(_START, elem_id="video-summary")
            with gr.Row():
                save_video = gr.DownloadButton("Save video", interactive=False, size="md", min_width=120)
                save_lines = gr.DownloadButton("Save JSON lines", interactive=False, size="md", min_width=120)
    views = [drawn, summary, save_video, save_lines]
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    running = start.click(begin, None, [summary], **at_once).then(
        detect,
        [file, threshold, chosen, track],
        views,
        preprocess=False,  # Gradio would open the file
        concurrency_limit=1,
        show_progress="hidden",
        api_visibility="private",
    )
    running.failure(lambda: _BUSY, None, [summary], **at_once)
    stop.click(end, None, [summary], **at_once)


def _as_it_is(value: str | None) -> FileData | None:
    return None if value is None else FileData(path=value, orig_name=Path(value).name)


def _progress(job: VideoJob) -> str:
    """Return the progress with the time left."""
    of = "" if job.total is None else f" of {max(job.total, job.num_frames)}"
    left = job.seconds_left()
    rest = "" if left is None else f", {int(left) // 60}:{int(left) % 60:02d} left"
    return f"Frame {job.num_frames}{of}{rest}"


def _summary(job: VideoJob, is_stopped: bool) -> str:
    """Return how the job ended."""
    count = f"{job.num_frames} frame{'s' * (job.num_frames != 1)}"
    if job.error is None:
        return f"{count} drawn"
    if is_stopped:
        return f"{_STOPPED} {count} drawn before."
    error = f"**Error:** {plain_text(job.error)}"
    return f"{error} {count} drawn before." if job.num_frames else error


def _nothing(message: str) -> list[Any]:
    empty = gr.DownloadButton(value=None, interactive=False)
    return [None, message, empty, empty]


def _download(file: Path) -> Any:
    return gr.DownloadButton(value=str(file), interactive=True)
