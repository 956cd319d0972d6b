"""Flags for modules of a user's own project, which tools import before they read the config."""

from __future__ import annotations

from argparse import ArgumentParser


def add_project_arguments(parser: ArgumentParser) -> None:
    """Add ``--import`` and ``--allow-unsafe-config`` to the command line of a tool."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module or .py file to run first: it may register datasets, heads and mixers, and its functions "
        "add_*_config(cfg) add config keys; may be given several times",
    )
    parser.add_argument(
        "--allow-unsafe-config", action="store_true", help="read config files with Python tags, which may run code"
    )
