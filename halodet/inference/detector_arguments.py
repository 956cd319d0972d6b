"""Command-line arguments of the tools that run a detector: a checkpoint with its config, or an exported model."""

from __future__ import annotations

import argparse

from halodet.inference.base_predictor import BasePredictor
from halodet.inference.exported import ExportedPredictor
from halodet.utils.import_errors import training_imports
from halodet.utils.project_arguments import add_project_arguments

__all__ = ["add_detector_arguments", "check_detector_arguments", "load_detector"]


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-file`` or ``--model``, and the flags that belong to a config."""
    detector = parser.add_mutually_exclusive_group(required=True)
    detector.add_argument("--config-file", help="config that the weights were trained with, or OUTPUT_DIR of a run")
    detector.add_argument("--model", metavar="FILE", help="exported model: an .onnx, .xml or .torchscript file")
    parser.add_argument("--allow-pickle", action="store_true", help="run code that pickle files hold")
    add_project_arguments(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides; must come last"
    )


def check_detector_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a message if a flag of configs is given with ``--model``."""
    if not args.model:
        return
    given = {
        "--opts": args.opts,
        "--import": args.imports,
        "--allow-pickle": args.allow_pickle,
        "--allow-unsafe-config": args.allow_unsafe_config,
    }
    for flag in (flag for flag, value in given.items() if value):
        parser.error(f"argument {flag}: not allowed with argument --model")


def load_detector(args: argparse.Namespace, score_threshold: float) -> BasePredictor:
    """Load the exported model, or the weights and the config.

    Raises:
        HalodetError: they cannot be loaded, or need packages that are not installed.
    """
    if args.model:
        return ExportedPredictor(args.model, score_threshold=score_threshold)
    with training_imports("--config-file"):  # an exported model needs neither of these
        from halodet.config.projects import import_projects
        from halodet.inference.predictor import Predictor

    return Predictor.from_pretrained(
        args.config_file,
        device=None,
        score_threshold=score_threshold,
        opts=args.opts,
        add_configs=import_projects(args.imports),
        allow_pickle=args.allow_pickle,
        allow_unsafe_config=args.allow_unsafe_config,
    )
