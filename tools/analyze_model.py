#!/usr/bin/env python3
"""Print parameters, FLOPs and activations of a model stage by stage, at any input size.

    python tools/analyze_model.py --config-file configs/mask_rcnn_halo_h4.yaml --size 800 1333

FLOPs are counted by fvcore for one image: a multiply-add is one FLOP; sums, activations and softmax are not counted.
Activations are the output elements of convolutions and matrix products. The cost of the heads depends on the number of
proposals: at most MODEL.RPN.POST_NMS_TOPK_TEST for boxes, TEST.DETECTIONS_PER_IMAGE for masks.
"""

from __future__ import annotations

import argparse
import logging
import sys

from halodet.benchmark.model_cost import analyze
from halodet.config.load import load_config
from halodet.config.projects import add_project_arguments, import_projects
from halodet.errors import HalodetError

import torch
from detectron2.modeling import build_model
from tabulate import tabulate


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config file, or name of a halodet config")
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1333), metavar=("HEIGHT", "WIDTH"),
                        help="image size in pixels (default: 800 1333)")  # fmt: skip
    add_project_arguments(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides KEY VALUE ...")
    args = parser.parse_args(argv)
    if min(args.size) < 1:
        parser.error(f"argument --size: {args.size} is invalid: expected a height and a width of at least 1")
    try:
        projects = import_projects(args.imports)
        cfg = load_config(args.config_file, args.opts, add_configs=projects, allow_unsafe=args.allow_unsafe_config)
    except HalodetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    print(f"{args.config_file}, one image of {args.size[0]}×{args.size[1]}")
    headers = ["", "parameters (M)", "GFLOPs", "activations (M)"]
    print(tabulate(analyze(model, *args.size), headers, tablefmt="github", floatfmt=".2f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
