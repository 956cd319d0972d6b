#!/usr/bin/env python3
"""Draw the predictions of a trained detector on images, and save them as COCO-style JSON.

    python tools/demo.py --config-file configs/mask_rcnn_halo_h4.yaml --input photos/ more/*.png --output drawn \\
        --opts MODEL.WEIGHTS output/mask_rcnn_halo_h4/model_final.pth

Exit code: 0 if every image was drawn, 1 if some failed, 2 for invalid arguments, config or weights, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from halodet.config import load_config
from halodet.config.lazy import is_lazy_config, load_lazy_config, set_score_threshold
from halodet.config.projects import AddConfig, add_project_arguments, import_projects
from halodet.errors import HalodetError
from halodet.inference import Predictor
from halodet.inference.demo import DETECTIONS_FILE, NOT_IMAGES, draw_images, find_images
from halodet.utils.warning_filters import ignore_detectron2_warnings

from detectron2.config import CfgNode
from omegaconf import DictConfig


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    ignore_detectron2_warnings()  # they would break the progress bar
    try:
        files = find_images(args.input, args.output)
        projects = import_projects(args.imports)
        predictor = Predictor(_load_config(args, projects), allow_pickle=args.allow_pickle)
        os.makedirs(args.output, exist_ok=True)
    except HalodetError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"demo.py: error: --output {args.output} is not a usable folder ({error.strerror}).", file=sys.stderr)
        return 2
    return draw_images(
        predictor, files, args.output, threshold=args.confidence_threshold, absolute_paths=args.absolute_paths
    )


def _load_config(args: argparse.Namespace, projects: Sequence[AddConfig]) -> CfgNode | DictConfig:
    """Load the config, of either kind, with the score threshold of the command line."""
    unsafe, threshold = args.allow_unsafe_config, args.confidence_threshold
    if is_lazy_config(args.config_file):
        lazy = load_lazy_config(args.config_file, args.opts, allow_unsafe=unsafe)
        set_score_threshold(lazy, threshold)
        return lazy
    cfg = load_config(args.config_file, args.opts, train=False, add_configs=projects, allow_unsafe=unsafe).clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config that the weights were trained with")
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
    parser.add_argument("--absolute-paths", action="store_true", help=f"write absolute paths to {DETECTIONS_FILE}")
    parser.add_argument("--allow-pickle", action="store_true", help="run code that pickle files hold")
    add_project_arguments(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last"
    )
    return parser


def _score(text: str) -> float:
    score = float(text)
    if not 0.0 <= score <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected a number from 0 to 1")
    return score


_score.__name__ = "number"  # argparse names the type in its message


if __name__ == "__main__":
    sys.exit(main())
