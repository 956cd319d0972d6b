#!/usr/bin/env python3
"""Compare time and memory of backbones and Mask R-CNNs: halodet and Detectron2's R50-FPN, Swin-T-FPN and ViTDet-B.

    python tools/benchmark_model.py --memory                               # the default models, one image of 800×1333
    python tools/benchmark_model.py --config-file my_config.yaml --size 1024x1024 --device cuda --dtype bfloat16

All models have random weights and get the same synthetic images with 8 polygons each, padded to a multiple of 32
pixels (no square padding for ViTDet). A backbone includes its feature pyramid p2 ... p6. Detectors use the heads of
Detectron2's mask_rcnn_R_50_FPN_1x with equal work for all: predictions are computed and trained, but proposals and the
100 detections are made from fixed noise.

Norms and frozen layers follow each model's own config and are listed in the table: R50-FPN as Detectron2 fine-tunes it
(FrozenBN, stem and res2 frozen), mask_rcnn_r50 the same network trained from random weights (SyncBN).

"forward" is inference; "training" is forward, backward and an SGD step with momentum and learning rate 0. All models
run in turns in one process; times are medians, ratios medians over rounds. On a GPU a time is that between CUDA events
and includes gaps while Python launches kernels. Peak memory is that of a training step, with its gradients, beyond
weights, momentum and inputs. Exit code 1 if the reference failed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from functools import partial
from typing import Any

from halodet.benchmark import models
from halodet.benchmark.measure import compare, first_line, keep_freed_memory
from halodet.benchmark.peak_memory import peak_memory
from halodet.benchmark.report import (
    add_common_arguments,
    describe_machine,
    describe_timing,
    format_figures,
    int_tuple,
    positive_int,
    save_results,
    write_report,
)
from halodet.errors import ConfigError

import torch
from tabulate import tabulate

# Warnings about Detectron2's own calls
warnings.filterwarnings("ignore", message="torch.meshgrid")
logging.getLogger("torch.fx").setLevel(logging.ERROR)

TITLES = {"backbone": "backbone with FPN", "detector": "Mask R-CNN"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    known = [*models.OURS, *models.DETECTRON2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", nargs="+", default=[], metavar="FILE", help="halodet configs instead of the default"
    )
    parser.add_argument("--models", nargs="*", choices=known, help="default: all; with --config-file Detectron2's")
    parser.add_argument("--reference", metavar="NAME", help="model that ratios are relative to (R50-FPN, or the first)")
    parser.add_argument("--kind", nargs="+", choices=models.KINDS, default=list(models.KINDS), help="default: both")
    parser.add_argument("--size", type=int_tuple("x", 32, 32), default=(800, 1333), metavar="HxW", help="(800x1333)")
    parser.add_argument("--batch", type=positive_int, default=1, help="images (default: 1)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    parser.add_argument("--channels-last", action="store_true", help="weights and images in channels-last format")
    add_common_arguments(parser, "output/benchmark_model")
    args = parser.parse_args(argv)
    default = list(models.DETECTRON2) if args.config_file else known
    args.names = list(dict.fromkeys(args.config_file + (default if args.models is None else args.models)))
    if not args.names:
        parser.error("argument --models: expected at least one model")
    args.reference = args.reference or ("R50-FPN" if "R50-FPN" in args.names else args.names[0])
    if args.reference not in args.names:
        parser.error(f"argument --reference: {args.reference!r} is invalid: expected one of {args.names}")
    try:
        for name in set(args.names) - set(models.DETECTRON2):
            models.check_config(name)
    except ConfigError as error:
        parser.error(str(error))
    args.case = models.Case(*args.size, args.batch, str(args.device), getattr(torch, args.dtype), args.channels_last)
    return args


def measure(kind: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return model -> description, and mode or "memory" -> figures."""
    results: dict[str, dict[str, Any]] = {}
    built = {}
    for name in args.names:
        try:
            built[name] = models.build_model(name, kind, args.case)
            results[name] = models.describe(built[name])
        except Exception as error:  # a model that cannot be built is a result
            results[name] = {"failed": first_line(error)}
    for mode in models.MODES:
        figures = compare(
            {name: partial(models.build_call, model, kind, mode, args.case) for name, model in built.items()},
            reference=args.reference,
            rounds=args.rounds,
            device=args.device,
            warmup=1,
            on_round=lambda i, mode=mode: print(f"{TITLES[kind]}, {mode}: round {i} of {args.rounds}", flush=True),
        )
        for name, values in figures.items():
            results[name][mode] = values
    built.clear()  # free memory for the measurements below
    for name, result in results.items():
        if args.memory and "ms" in result.get("training", {}):
            arguments = (name, kind, "training", args.case)
            result["memory"] = peak_memory(models.build_model_call, *arguments, device=args.device)
    return results


def make_table(results: dict[str, dict]) -> str:
    """Format one table per kind with one row per model, followed by the errors."""
    parts = []
    for kind, by_name in results.items():
        rows, errors = [], []
        for name, result in by_name.items():
            row = [name, *(f"{result[key]:.1f}" if key in result else "" for key in ("parameters", "trained"))]
            row.append(result.get("norms", ""))
            for column in (*models.MODES, "memory"):
                figures = result.get(column, {})
                row.append(format_figures(figures) if figures else "")
                if "failed" in figures:
                    errors.append(f"{name}, {column}: {figures['failed']}")
            if "failed" in result:
                errors.append(f"{name}: {result['failed']}")
            rows.append(row)
        headers = [TITLES[kind], "parameters (M)", "trained (M)", "norms", *models.MODES, "training peak"]
        parts += [tabulate(rows, headers, tablefmt="github", disable_numparse=True), *errors]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    keep_freed_memory()
    timing = describe_timing(args.device, args.rounds, use_graph=False)
    title = f"{args.case}, random weights, {describe_machine(args.device)}, {timing}"
    print(title)
    results: dict[str, dict] = {}
    for kind in args.kind:
        results[kind] = measure(kind, args)
        save_results(args.output, title, results)
    panels = {
        mode: (
            args.names,
            {TITLES[k]: [results[k][n].get(mode, {}).get("ratio") for n in args.names] for k in args.kind},
        )
        for mode in models.MODES
    }
    write_report(args.output, title, make_table(results), panels, args.reference)
    return int(any("ms" not in by_name[args.reference].get("training", {}) for by_name in results.values()))


if __name__ == "__main__":
    sys.exit(main())
