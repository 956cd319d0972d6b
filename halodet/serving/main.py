"""Command line of tools/app.py."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from halodet.errors import ConfigError, HalodetError
from halodet.inference.detector_arguments import add_detector_arguments, check_detector_arguments, load_detector
from halodet.inference.exported import ExportedPredictor
from halodet.serving.asgi import App
from halodet.serving.detector import Detector
from halodet.serving.examples import copy_examples, draw_examples
from halodet.utils.import_errors import is_installed
from halodet.utils.warning_filters import ignore_detectron2_warnings

__all__ = ["main", "make_app"]

_MEGABYTE = 1_000_000
_UPLOADS = 64  # uploads of the maximum size that are kept
_API_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM, and return the exit code."""
    args = _parse(argv, description)
    ignore_detectron2_warnings()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        # uvicorn raises the signal that ended it once more, which must not skip the removal of the folder.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _check_packages(args.api_only)
        from halodet.serving.web_server import listen, make_server

        with listen(args.host, args.port) as bound, tempfile.TemporaryDirectory(prefix="halodet-app-") as folder:
            detector = _load_detector(args)
            app = make_app(
                detector,
                None if args.api_only else folder,
                examples=args.examples,
                max_bytes=int(args.max_upload_mb * _MEGABYTE),
                seconds=args.request_seconds,
                max_waiting=args.max_waiting,
                max_video_seconds=args.max_video_seconds,
            )
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"Serving {detector.name} at http://{host}:{bound.getsockname()[1]} (stop with Ctrl-C)", flush=True)
            try:
                make_server(app, args.request_seconds).run(sockets=[bound])
            finally:
                if not args.api_only:
                    from halodet.serving.video_job import stop_jobs

                    stop_jobs()  # their files are in the folder
    except KeyboardInterrupt:
        pass  # the normal end of a server
    except HalodetError as error:
        print(f"app.py: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_app(
    detector: Detector,
    folder: str | None,
    *,
    examples: str | None = None,
    max_bytes: int = 20 * _MEGABYTE,
    seconds: float = 30.0,
    max_waiting: int = 16,
    max_video_seconds: float = 60.0,
) -> App:
    """Return the ASGI application of the API, and of the page.

    Args:
        detector: the detector.
        folder: an empty folder for the files of the page; None for the API only.
        examples: folder of the example images; None for drawn shapes.
        max_bytes: maximum size of the body of a request.
        seconds: time for a request to arrive.
        max_waiting: number of requests that may wait for the detector.
        max_video_seconds: maximum duration of a video of the page.

    Raises:
        ConfigError: the folder of the examples has no image.
    """
    # The packages of the extras, which may be missing.
    from halodet.serving.api import make_api
    from halodet.serving.request_limits import RequestLimits

    api = make_api(detector, max_waiting)
    if folder is not None:
        uploads, downloads, shown = (Path(folder) / name for name in ("uploads", "downloads", "examples"))
        for path in (uploads, downloads, shown):
            path.mkdir()
        # Read when Gradio is imported and used; without them it reports its use to its developers.
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        from halodet.serving.page import make_page, mount_page

        files = draw_examples(shown) if examples is None else copy_examples(examples, shown)
        page = make_page(detector, downloads, files, max_waiting, max_video_seconds)
        mount_page(api, page, uploads, _UPLOADS * max_bytes)
    return RequestLimits(api, max_bytes, seconds)


def _check_packages(api_only: bool) -> None:
    """Raise ConfigError if a package of the extra is not installed."""
    missing = [name for module, name in _API_PACKAGES.items() if not is_installed(module)]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed. Fix: pip install 'halodet[{'api' if api_only else 'app'}]'.")
    if not api_only and not is_installed("gradio"):
        raise ConfigError(
            "gradio is not installed: the page needs it. Fix: pip install 'halodet[app]', or use --api-only."
        )


def _load_detector(args: argparse.Namespace) -> Detector:
    minimum, name = args.min_score, os.path.basename(args.model or args.config_file)
    predictor = load_detector(args, minimum)
    if isinstance(predictor, ExportedPredictor):
        minimum = max(minimum, predictor.metadata.score_threshold)
    threshold = max(args.confidence_threshold, minimum)
    max_pixels = int(args.max_megapixels * 1e6)
    return Detector(predictor, name, min_threshold=minimum, score_threshold=threshold, max_pixels=max_pixels)


def _parse(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="app.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1, this machine only)")
    add("--port", type=_port, default=7860, help="port to bind; 0 for a free one (default: 7860)")
    add("--api-only", action="store_true", help="serve the HTTP interface without the page; needs no gradio")
    add("--examples", metavar="DIR", help="folder of example images for the page (default: drawn shapes)")
    add("--confidence-threshold", type=_score, default=0.5, metavar="SCORE", help="first threshold (default: 0.5)")
    add("--min-score", type=_score, default=0.05, metavar="SCORE", help="lowest threshold to choose (default: 0.05)")
    add("--max-upload-mb", type=_positive, default=20, metavar="MB", help="maximum size of a request (default: 20)")
    add(
        "--max-megapixels",
        type=_positive,
        default=25,
        metavar="N",
        help="maximum size of an image or frame (default: 25)",
    )
    add("--max-video-seconds", type=_positive, default=60, metavar="S", help="maximum length of a video (default: 60)")
    add("--request-seconds", type=_positive, default=30, metavar="S", help="time for a request to arrive (default: 30)")
    add("--max-waiting", type=_count, default=16, metavar="N", help="requests that may wait (default: 16)")
    add_detector_arguments(parser)
    args = parser.parse_args(argv)
    if args.min_score > args.confidence_threshold:
        parser.error(
            f"argument --min-score: {args.min_score} is above --confidence-threshold {args.confidence_threshold}"
        )
    check_detector_arguments(parser, args)
    return args


def _score(text: str) -> float:
    return _checked(text, float(text), 0.0, 1.0, "a number from 0 to 1")


def _positive(text: str) -> float:
    return _checked(text, float(text), 0.001, 1e6, "a positive number")


def _count(text: str) -> int:
    return int(_checked(text, int(text), 1, 10_000, "an integer from 1 to 10000"))


def _port(text: str) -> int:
    return int(_checked(text, int(text), 0, 65535, "an integer from 0 to 65535"))


def _checked(text: str, number: float, low: float, high: float, expected: str) -> float:
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected {expected}")
    return number


for _type in (_score, _positive):
    _type.__name__ = "number"  # argparse names the type in its message
for _type in (_count, _port):
    _type.__name__ = "integer"
