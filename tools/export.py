#!/usr/bin/env python3
"""Export a trained detector to a file that runs without Detectron2, and compare the file with the model.

    python tools/export.py --config-file configs/mask_rcnn_halo_h4.yaml --format onnx --output model.onnx \\
        --opts MODEL.WEIGHTS output/mask_rcnn_halo_h4/model_final.pth

The file takes images of any size, one at a time, and has their preprocessing, the class names, thresholds and a hash of
the weights in its metadata. halodet.inference.ExportedPredictor and tools/demo.py --model read it. Both run on five
image sizes, and a table of differences is printed.

Exit code: 0 if the file agrees with the model, 1 if it does not, 2 for invalid arguments, config, weights or images,
74 if the file cannot be written, 130 after Ctrl-C. A file that disagrees is kept; in all other cases an older file of
this name remains.
"""

from __future__ import annotations

import argparse
import signal
import sys

from halodet.errors import HalodetError
from halodet.inference.demo import find_images
from halodet.inference.export_metadata import SUFFIXES
from halodet.utils.import_errors import training_imports
from halodet.utils.project_arguments import add_project_arguments
from halodet.utils.warning_filters import ignore_detectron2_warnings


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    ignore_detectron2_warnings()
    try:
        with training_imports("tools/export.py"):
            from halodet.config.projects import import_projects
            from halodet.export.formats import check_format
            from halodet.export.main import export_detector
            from halodet.inference import Predictor
        check_format(args.output, args.format, half=args.half, int8=args.int8)
        calibration = find_images(args.calibration, flag="--calibration") if args.calibration else []
        images = find_images(args.images, flag="--images") if args.images else []
        predictor = Predictor.from_pretrained(
            args.config_file,
            device="cpu",
            score_threshold=None,
            opts=args.opts,
            add_configs=import_projects(args.imports),
            allow_pickle=args.allow_pickle,
            allow_unsafe_config=args.allow_unsafe_config,
        )
        agrees = export_detector(
            predictor,
            args.output,
            args.format,
            half=args.half,
            int8=args.int8,
            calibration=calibration,
            images=images,
            backbone_only=args.backbone_only,
        )
    except KeyboardInterrupt:
        print("export.py: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except HalodetError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"export.py: error: {args.output} cannot be written ({error.strerror or error}).", file=sys.stderr)
        return 74
    return 0 if agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="config that the weights were trained with, or OUTPUT_DIR of a run",
    )
    parser.add_argument("--format", required=True, choices=SUFFIXES, help="format of the file")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--half", action="store_true", help="store weights in float16 (onnx and openvino)")
    parser.add_argument("--int8", action="store_true", help="quantize to int8 (onnx and openvino)")
    parser.add_argument("--calibration", nargs="+", metavar="PATH", help="images from which int8 ranges are measured")
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="images, of which five are compared (default: simple shapes)"
    )
    parser.add_argument("--backbone-only", action="store_true", help="export the backbone without the heads")
    parser.add_argument("--allow-pickle", action="store_true", help="read pickle files, which may run code")
    add_project_arguments(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last"
    )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the temporary folder
    sys.exit(main())
