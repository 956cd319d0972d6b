#!/usr/bin/env python3
"""Draw the predictions of a trained detector on images, and save them as COCO-style JSON.

    python tools/demo.py --config-file configs/mask_rcnn_halo_h4.yaml --input photos/ more/*.png --output drawn \\
        --opts MODEL.WEIGHTS output/mask_rcnn_halo_h4/model_final.pth
    python tools/demo.py --model model.onnx --input photos/ --output drawn

An exported model (--model) needs no PyTorch and no Detectron2: pip install 'halodet[runtime]'.

Exit code: 0 if every image was drawn, 1 if some failed, 2 for invalid arguments, config or weights, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys

from halodet.errors import HalodetError
from halodet.inference.demo import DETECTIONS_FILE, NOT_IMAGES, ImagePredictor, draw_images, find_images
from halodet.inference.exported import ExportedPredictor
from halodet.utils.project_arguments import add_project_arguments
from halodet.utils.warning_filters import ignore_detectron2_warnings


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parse(argv)
    ignore_detectron2_warnings()  # they would break the progress bar
    try:
        files = find_images(args.input, args.output)
        if args.model:
            predictor = ExportedPredictor(args.model, score_threshold=args.confidence_threshold)
        else:
            predictor = _load_predictor(args)
        os.makedirs(args.output, exist_ok=True)
    except HalodetError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"demo.py: error: --output {args.output} is not a usable folder ({error.strerror}).", file=sys.stderr)
        return 2
    if isinstance(predictor, ExportedPredictor) and args.confidence_threshold < predictor.metadata.score_threshold:
        print(
            f"demo.py: warning: --confidence-threshold {args.confidence_threshold} is below the score threshold "
            f"{predictor.metadata.score_threshold} that {args.model} was exported with",
            file=sys.stderr,
        )
    return draw_images(
        predictor,
        files,
        args.output,
        threshold=args.confidence_threshold,
        absolute_paths=args.absolute_paths,
        batch_size=args.batch_size,
    )


def _load_predictor(args: argparse.Namespace) -> ImagePredictor:
    """Load the weights and the config, of either kind, with the score threshold of the command line."""
    # An exported model needs neither of these.
    from halodet.config.projects import import_projects
    from halodet.inference import Predictor

    return Predictor.from_pretrained(
        args.config_file,
        device=None,
        score_threshold=args.confidence_threshold,
        opts=args.opts,
        add_configs=import_projects(args.imports),
        allow_pickle=args.allow_pickle,
        allow_unsafe_config=args.allow_unsafe_config,
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    detector = parser.add_mutually_exclusive_group(required=True)
    detector.add_argument("--config-file", help="config that the weights were trained with")
    detector.add_argument("--model", metavar="FILE", help="exported model: an .onnx, .xml or .torchscript file")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="image files, folders or quoted glob patterns; in folders, hidden files and files with these suffixes are "
        f"skipped: {' '.join(sorted(NOT_IMAGES))}",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help=f"folder for the drawings and {DETECTIONS_FILE}")
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
    parser.add_argument("--allow-pickle", action="store_true", help="run code that pickle files hold")
    add_project_arguments(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last"
    )
    args = parser.parse_args(argv)
    if args.model:
        given = {
            "--opts": args.opts,
            "--import": args.imports,
            "--allow-pickle": args.allow_pickle,
            "--allow-unsafe-config": args.allow_unsafe_config,
        }
        for flag in (flag for flag, value in given.items() if value):
            parser.error(f"argument {flag}: not allowed with argument --model")
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
