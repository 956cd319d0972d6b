#!/usr/bin/env python3
"""Draw the predictions of a trained detector on images, a video or a camera, and save them as COCO-style JSON.

    python tools/demo.py --config-file configs/mask_rcnn_halo_h4.yaml --input photos/ more/*.png --output drawn \\
        --opts MODEL.WEIGHTS output/mask_rcnn_halo_h4/model_final.pth
    python tools/demo.py --model model.onnx --input photos/ --output drawn
    python tools/demo.py --model model.onnx --video clip.mp4 --output-video drawn.mp4 --track
    ffmpeg -i clip.avi -f matroska - | python tools/demo.py --model model.onnx --video - --output drawn
    python tools/demo.py --model model.onnx --webcam 0

Videos need pip install 'halodet[video]'. Without an output, they are shown in a window, in which q and Esc stop. An
exported model (--model) needs no PyTorch and no Detectron2: pip install 'halodet[runtime]'.

Exit code: 0 if every image or frame was drawn, 1 if some failed, 2 for invalid arguments, config, weights or video,
130 after Ctrl-C or SIGTERM, with what was drawn before.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

if any(word.partition("=")[0] == "--model" for word in sys.argv[1:]):
    os.environ.setdefault("HALODET_REGISTER", "0")  # an exported model needs neither PyTorch nor Detectron2

from halodet.errors import HalodetError
from halodet.inference.camera import Camera
from halodet.inference.demo import DETECTIONS_FILE, NOT_IMAGES, draw_images, find_images
from halodet.inference.detector_arguments import add_detector_arguments, check_detector_arguments, load_detector
from halodet.inference.exported import ExportedPredictor
from halodet.inference.tracking import LOW_SCORE, Tracker
from halodet.inference.video import draw_video, output_path
from halodet.inference.video_reader import VideoReader
from halodet.utils.warning_filters import ignore_detectron2_warnings


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parse(argv)
    ignore_detectron2_warnings()  # they would break the progress bar
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended keeps what was drawn
        if args.input is not None:
            files, folder = find_images(args.input, args.output), args.output
        else:
            source = VideoReader(args.video) if args.video is not None else Camera(args.webcam)
            video = output_path(source, args.output_video, args.output)
            folder = os.path.dirname(video or "")
            tracker = None
            if args.track:
                tracker = Tracker(float(source.frame_rate), score_threshold=args.confidence_threshold)
        # Objects below the threshold continue tracks.
        predictor = load_detector(args, args.confidence_threshold * (LOW_SCORE if args.track else 1))
        if folder:
            os.makedirs(folder, exist_ok=True)
    except KeyboardInterrupt:
        print("demo.py: stopped", file=sys.stderr)
        return 130
    except HalodetError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        flag = "--output " if error.filename in (None, args.output) else ""
        name = error.filename or args.output
        print(f"demo.py: error: {flag}{name} cannot be used ({error.strerror or error}).", file=sys.stderr)
        return 2
    if isinstance(predictor, ExportedPredictor) and args.confidence_threshold < predictor.metadata.score_threshold:
        print(
            f"demo.py: warning: --confidence-threshold {args.confidence_threshold} is below the score threshold "
            f"{predictor.metadata.score_threshold} that {args.model} was exported with",
            file=sys.stderr,
        )
    threshold, batch_size = args.confidence_threshold, args.batch_size
    if args.input is None:
        return draw_video(predictor, source, video, threshold=threshold, tracker=tracker, batch_size=batch_size)
    return draw_images(
        predictor, files, args.output, threshold=threshold, absolute_paths=args.absolute_paths, batch_size=batch_size
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="image files, folders or quoted glob patterns; in folders, hidden files and files with these suffixes are "
        f"skipped: {' '.join(sorted(NOT_IMAGES))}",
    )
    source.add_argument(
        "--video",
        "--video-input",
        metavar="FILE",
        help="video file, URL of a stream, or - for stdin (MPEG-TS, Matroska, Y4M and other formats for pipes)",
    )
    source.add_argument("--webcam", type=int, nargs="?", const=0, metavar="N", help="number of a camera (default: 0)")
    parser.add_argument(
        "--output", metavar="DIR", help=f"folder for the drawings and {DETECTIONS_FILE}, or the drawn video"
    )
    parser.add_argument(
        "--output-video",
        metavar="FILE",
        help="drawn video, an .mp4 file; its detections are in a .jsonl file beside it",
    )
    parser.add_argument("--track", action="store_true", help="give objects of a video track ids")
    parser.add_argument(
        "--confidence-threshold", type=_score, default=0.5, metavar="SCORE", help="minimum score (default: 0.5)"
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=1,
        metavar="N",
        help="images per call of the model, of those that have the same size after resizing (default: 1); "
        "an exported model (--model) takes one image per call",
    )
    parser.add_argument("--absolute-paths", action="store_true", help=f"write absolute paths to {DETECTIONS_FILE}")
    add_detector_arguments(parser)
    args = parser.parse_args(argv)
    if args.input is not None and args.output is None:
        parser.error("the following arguments are required: --output")
    of_videos = {"--output-video": args.output_video, "--track": args.track}
    for flag in (flag for flag, value in of_videos.items() if value and args.input is not None):
        parser.error(f"argument {flag}: not allowed with argument --input")
    if args.absolute_paths and args.input is None:
        parser.error("argument --absolute-paths: only allowed with argument --input")
    if args.output is not None and args.output_video is not None:
        parser.error("argument --output-video: not allowed with argument --output")
    check_detector_arguments(parser, args)
    return args


def _score(text: str) -> float:
    score = float(text)
    if not 0.0 <= score <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected a number from 0 to 1")
    return score


_score.__name__ = "number"  # argparse names the type in its message


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected a positive integer")
    return number


_positive.__name__ = "integer"


if __name__ == "__main__":
    sys.exit(main())
