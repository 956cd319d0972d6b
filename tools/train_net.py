#!/usr/bin/env python3
"""Train and evaluate a detector. Flags, logs and file layout are those of Detectron2's tools/train_net.py.

Several processes are started by torchrun, srun or --num-gpus. Exit codes: 0 done, 2 invalid config, data or weights,
70 non-finite loss, 74 a file cannot be written, 75 preempted by SIGTERM or SIGUSR1 (continue with --resume).
"""

from __future__ import annotations

import argparse
import sys

import halodet.engine.main
from halodet.engine.main import argument_parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line: Detectron2's flags and halodet's."""
    parser = argument_parser(__doc__)
    data = parser.add_argument_group("COCO-format data of your own, instead of the config's datasets")
    data.add_argument("--train-json", metavar="FILE", help="COCO json to train on; its classes become the model's")
    data.add_argument("--train-images", metavar="DIR", help="folder of the images of --train-json")
    data.add_argument("--val-json", metavar="FILE", help="COCO json to evaluate on")
    data.add_argument("--val-images", metavar="DIR", help="folder of the images of --val-json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit code."""
    return halodet.engine.main.main(parse(argv))


if __name__ == "__main__":
    sys.exit(main())
