"""Command line of tools/compare.py."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from halodet.benchmark.report import output_folder, positive_int
from halodet.config.keys import default_values
from halodet.engine.main import add_training_arguments, check_num_gpus
from halodet.errors import ConfigError

_PLACE = "Fix: give KEY VALUE pairs after --output DIR, or after a word --"
_SET_HERE = {"SEED": "--seeds", "OUTPUT_DIR": "--output"}
_VARIANT_NAME = re.compile(r"\w[\w.+-]*")


def parse(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Return the arguments, with ``variants`` as a mapping from names to options and ``train_flags``.

    Raises:
        SystemExit: with code 2, an argument is invalid.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", nargs="+", required=True, metavar="FILE", help="config files, or names")
    parser.add_argument("--seeds", nargs="+", type=_seed, required=True, metavar="N", help="seeds of the runs")
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY VALUE"),
                        help="train every config with these options and this name; may be repeated")  # fmt: skip
    parser.add_argument("--vary", nargs="+", metavar=("KEY", "VALUE"),
                        help="train everything with each value of a config key, and mark the best one")  # fmt: skip
    parser.add_argument("--size", nargs=2, type=positive_int, metavar=("HEIGHT", "WIDTH"),
                        help="image size of the multiply-adds (default: INPUT.MIN_SIZE_TEST, square)")  # fmt: skip
    parser.add_argument("--output", type=output_folder, default="output/compare", metavar="DIR",
                        help="folder of runs, tables and chart (default: output/compare)")  # fmt: skip
    parser.add_argument("--num-gpus", type=int, default=1, help="number of GPUs of each run (default: 1)")
    add_training_arguments(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides KEY VALUE ... of all runs")
    args = parser.parse_args(argv)
    args.opts = args.opts[args.opts[:1] == ["--"] :]  # argparse keeps it
    try:
        _check(args)
    except ConfigError as error:
        parser.error(str(error))
    args.variants = {name: tuple(options) for name, *options in args.variant} or {"": ()}
    args.train_flags = _train_flags(args)
    return args


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected an integer of at least 0. {_PLACE}")
    return int(text)


def _check(args: argparse.Namespace) -> None:
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, args.seeds))} is invalid: expected different seeds")
    for name, *options in args.variant:
        if not _VARIANT_NAME.fullmatch(name):
            raise ConfigError(f"--variant {name} is invalid: expected a name of letters, digits and ._+- first")
        if not options or len(options) % 2:
            expected = f"expected KEY VALUE pairs after the name, got {len(options)} words: {' '.join(options)}"
            raise ConfigError(f"--variant {name} is invalid: {expected}")
        _check_keys(options[::2], f"--variant {name}")
    names = [name for name, *_ in args.variant]
    if len(set(names)) < len(names):
        raise ConfigError(f"--variant {', '.join(names)} is invalid: expected different names")
    _check_keys(args.opts[::2], "the overrides")
    if args.vary:
        _check_vary(args)
    given = [args.train_json, args.val_json]
    if any(given) and not all(given):
        raise ConfigError("--train-json and --val-json must be given together: every run is trained and evaluated")
    if args.num_gpus > 1:
        check_num_gpus(args)


def _check_keys(keys: list[str], where: str) -> None:
    for key in keys:
        if key in _SET_HERE:
            raise ConfigError(f"{key} is invalid in {where}: it is set by {_SET_HERE[key]}")


def _check_vary(args: argparse.Namespace) -> None:
    key, *values = args.vary
    _check_keys([key], "--vary")
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"--vary {key} {' '.join(values)} is invalid: expected different values after the key")
    for word in values:
        if word in default_values():
            raise ConfigError(f"--vary {key} has the value {word}, which is a config key. {_PLACE}")
    for where, options in (("the overrides", args.opts), *((f"--variant {name}", o) for name, *o in args.variant)):
        if key in options[::2]:
            raise ConfigError(f"--vary {key} is invalid: {where} has this key too. Fix: remove one of them")


def _train_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the flags of tools/train_net.py that all runs have."""
    flags = ["--num-gpus", str(args.num_gpus), "--dist-timeout", str(args.dist_timeout)]
    if args.num_gpus > 1:
        flags += ["--dist-url", "auto"]  # a free port: comparisons may run beside each other
    for name in ("train_json", "train_images", "val_json", "val_images"):
        if getattr(args, name):
            flags.append(f"--{name.replace('_', '-')}={Path(getattr(args, name))}")
    flags += [f"--import={module}" for module in args.imports]
    for name in ("allow_pickle", "allow_unsafe_config", "crowds_as_objects"):
        if getattr(args, name):
            flags.append(f"--{name.replace('_', '-')}")
    return tuple(flags)
