#!/usr/bin/env python3
"""Time and memory of whole backbones and whole Mask R-CNNs, side by side: halodet's and Detectron2's R50-FPN, Swin-T-FPN and ViTDet-B.

    python tools/benchmark_model.py --memory                               # the default contenders on one image of 800×1333
    python tools/benchmark_model.py --config-file my_config.yaml --size 1024x1024 --device cuda --dtype bfloat16

All have random weights and the same synthetic images with 8 polygons each, padded to a multiple of 32 pixels (ViTDet's are not padded to a
square either). A contender is a backbone with its feature pyramid, p2 … p6; a halodet config gives its own. The detectors put the same
heads on it, those of Detectron2's mask_rcnn_R_50_FPN_1x, and the heads always do the same work: what the RPN and the box predictor put
out is computed and trained, but proposals and detections are made from fixed noise in its place. So every contender has the same proposals
(as many foreground boxes as when training begins: 9 of 512 at 800×1333), and the same 100 detections whose masks are predicted and pasted.

Norms and frozen layers are those of each model's own config, and stand in the table. R50-FPN is as Detectron2 fine-tunes it: FrozenBN,
stem and res2 not trained, no norm in the FPN, which saves it work in training; mask_rcnn_r50 is the same network trained from random
weights as halodet's configs are (SyncBN in backbone and FPN, in one process the same as BN). With random weights FrozenBN lets maps and
losses of R50-FPN grow to tens and hundreds; they stay finite, and its time does not depend on them.

Forward is inference, training is forward, backward and a step of SGD with momentum (its learning rate 0, so that every round does the same
work). All contenders run in turns in one process; times are medians, ratios medians over rounds. Peak memory is what a training step needs
beyond weights, momentum and inputs, on the CPU in a fresh process each.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from halodet.benchmark import models
from halodet.benchmark.chart import draw_ratios
from halodet.benchmark.measure import interleave, peak_memory, ratio, use_even_allocator
from halodet.errors import ConfigError

import torch
from tabulate import tabulate

# What PyTorch remarks on Detectron2's calls is nothing a user could act on.
warnings.filterwarnings("ignore", message="torch.meshgrid")
logging.getLogger("torch.fx").setLevel(logging.ERROR)

TITLES = {"backbone": "backbone with FPN", "detector": "whole Mask R-CNN"}
# A training step takes about three times as long as a forward pass, which the time left is reckoned with.
WEIGHTS = {"forward": 1, "training": 3}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", nargs="+", default=[], metavar="FILE", help="halodet configs, in place of the default ones"
    )
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help=f"any of {' '.join([*models.OURS, *models.DETECTRON2])} (all)"
    )
    parser.add_argument(
        "--reference", metavar="NAME", help="what ratios are relative to (R50-FPN, or the first contender)"
    )
    parser.add_argument(
        "--what", nargs="+", choices=models.KINDS, default=list(models.KINDS), help="(backbone detector)"
    )
    parser.add_argument("--size", default="800x1333", metavar="HxW", help="of images (800x1333)")
    parser.add_argument("--batch", type=int, default=1, help="images (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16 is autocast (float32)"
    )
    parser.add_argument("--channels-last", action="store_true", help="weights and images with channels last")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each (5)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory of a training step too")
    parser.add_argument(
        "--system-allocator",
        action="store_true",
        help="leave glibc's allocator as it is; else it reuses all blocks alike",
    )
    folder = Path("output/benchmark_model")
    parser.add_argument(
        "--output", type=Path, default=folder, metavar="FOLDER", help="for results.json, table.md, ratios.png"
    )
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+x\d+", args.size) or min(map(int, args.size.split("x"))) < 32:
        parser.error(f"--size is {args.size}, expected HEIGHTxWIDTH in whole numbers of at least 32")
    if min(args.batch, args.rounds) < 1:
        parser.error("--batch and --rounds must be at least 1")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device is {args.device}, expected cpu, cuda or cuda:N")
    if args.device != "cpu" and (torch.device(args.device).index or 0) >= torch.cuda.device_count():
        parser.error(
            f"--device is {args.device}, but PyTorch sees {torch.cuda.device_count()} GPUs here, counted from 0"
        )
    known = [*models.OURS, *models.DETECTRON2]
    unknown = [name for name in args.contenders or [] if name not in known]
    if unknown:
        parser.error(f"no contender {', '.join(unknown)}: there are {', '.join(known)}, and --config-file takes others")
    args.names = list(
        dict.fromkeys(args.config_file + (args.contenders or (list(models.DETECTRON2) if args.config_file else known)))
    )
    args.reference = args.reference or ("R50-FPN" if "R50-FPN" in args.names else args.names[0])
    if args.reference not in args.names:
        parser.error(f"--reference is {args.reference}, which is no contender here: these are {', '.join(args.names)}")
    try:
        for name in args.names:
            if name not in models.DETECTRON2:
                models.check_config(name)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.json").touch()
    except ConfigError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written to: {error.strerror}")
    height, width = map(int, args.size.split("x"))
    args.setting = models.Setting(
        height, width, args.batch, args.device, getattr(torch, args.dtype), args.channels_last
    )
    return args


def attempt(what: str, figures: dict, call: Callable, *arguments: object, **options: object) -> object:
    """What a call returns, or None and its error's first line in ``figures``: what a contender cannot do is a result."""
    try:
        return call(*arguments, **options)
    except Exception as error:  # contenders are other people's code, and may raise anything
        figures.clear()
        figures["failed"] = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{what} failed: {figures['failed']}", flush=True)
        return None


class Progress:
    """Says what was done and about how long the rest takes."""

    def __init__(self, total: float) -> None:
        self.start, self.done, self.total = time.monotonic(), 0.0, total

    def step(self, weight: float, text: str) -> None:
        self.done += weight
        left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        print(f"{text}; about {left / 60:.0f} min left", flush=True)


def measure(kind: str, args: argparse.Namespace, results: dict, progress: Progress, save: Callable[[], None]) -> None:
    """Everything about one kind of model, into ``results``: contender -> what it is, and mode -> figures."""
    device = torch.device(args.device)
    contenders = {}
    for name in args.names:
        results[name] = {}
        model = attempt(f"{TITLES[kind]}: {name}", results[name], models.build_model, name, kind, args.setting)
        if model is not None:
            contenders[name] = model
            results[name].update(models.describe(model), **{mode: {} for mode in models.MODES})
    for mode in models.MODES:
        calls, seconds = {}, {}
        for name, model in contenders.items():
            call = attempt(
                f"{TITLES[kind]}, {mode}: {name}",
                results[name][mode],
                models.build_call,
                model,
                kind,
                mode,
                args.setting,
            )
            if call is not None:
                calls[name], seconds[name] = call, []
        for i in range(args.rounds + 1):  # the first compiles, tunes and gets memory, and does not count
            for name in list(calls):
                one = {name: calls[name]}
                times = attempt(
                    f"{TITLES[kind]}, {mode}: {name}",
                    results[name][mode],
                    interleave,
                    one,
                    rounds=1,
                    device=device,
                    warmup=0,
                )
                if times is None:
                    del calls[name], seconds[name]
                elif i:
                    seconds[name] += times[name]
            for name, times in seconds.items() if i else ():
                results[name][mode]["ms"] = statistics.median(times) * 1e3
                results[name][mode]["ratio"] = (
                    ratio(times, seconds[args.reference]) if args.reference in seconds else None
                )
            progress.step(
                WEIGHTS[mode], f"{TITLES[kind]}, {mode}: " + (f"round {i} of {args.rounds}" if i else "warmed up")
            )
            save()
    contenders = model = calls = call = one = None  # their memory is wanted below
    for name in args.names if args.memory else ():
        memory = results[name]["memory"] = {}
        if "failed" not in results[name].get("training", results[name]):
            memory["peak_mib"] = attempt(f"{TITLES[kind]}, memory: {name}", memory, peak_mib, name, kind, args.setting)
        progress.step(WEIGHTS["training"] / len(args.names), f"{TITLES[kind]}, memory: {name}")
        save()


def peak_mib(name: str, kind: str, setting: models.Setting) -> float | None:
    """Of a training step, in a fresh process on the CPU; None where the system does not tell."""
    peak = peak_memory(models.build_model_call, name, kind, "training", setting, device=torch.device(setting.device))
    return None if peak is None else peak / 2**20


def table(results: dict[str, dict]) -> str:
    """One row per contender for each kind of model, with the reasons of what failed below."""
    parts = []
    for kind, contenders in results.items():
        rows, failures = [], []
        for name, result in contenders.items():
            numbers = [f"{result[key]:.1f}" if key in result else "" for key in ("parameters", "trained")]
            row = [name, *numbers, result.get("norms", "")]
            for column in (*models.MODES, "memory"):
                figures = result.get(column, {})
                if "failed" in figures:
                    failures.append(f"{name}, {column}: {figures['failed']}")
                row.append("failed" if "failed" in {**result, **figures} else cell(figures))
            if "failed" in result:
                failures.append(f"{name}: {result['failed']}")
            rows.append(row)
        headers = [TITLES[kind], "parameters (M)", "trained (M)", "norms", *models.MODES, "training peak"]
        parts.append("\n\n".join([tabulate(rows, headers, tablefmt="github", disable_numparse=True), *failures]))
    return "\n\n".join(parts)


def cell(figures: dict) -> str:
    """Time and ratio, or peak memory, as far as there is any."""
    if figures.get("peak_mib") is not None:
        return f"{figures['peak_mib']:.0f} MiB"
    text = f"{figures['ms']:.1f} ms" if "ms" in figures else ""
    return text + (f" ({figures['ratio']:.2f}×)" if figures.get("ratio") else "")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if argv is None and args.device == "cpu" and not args.system_allocator:
        use_even_allocator()
    name = f"{torch.get_num_threads()} CPU threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    title = (
        f"{args.setting}, random weights, {name}, PyTorch {torch.__version__}, Python {platform.python_version()}; "
        f"ratios to {args.reference}, median of {args.rounds} rounds"
    )
    print(title)
    results: dict[str, dict] = {kind: {} for kind in args.what}

    def save() -> None:  # after every round, so that an interrupted run has lost nothing
        (args.output / "results.json").write_text(
            json.dumps({"machine": title, "results": results}, indent=1), encoding="utf-8"
        )

    progress = Progress(
        len(args.what) * ((args.rounds + 1) * sum(WEIGHTS.values()) + args.memory * WEIGHTS["training"])
    )
    for kind in args.what:
        measure(kind, args, results[kind], progress, save)
    text = table(results)
    print(text)
    (args.output / "table.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    bars = {
        mode: (
            args.names,
            {TITLES[kind]: [results[kind][n].get(mode, {}).get("ratio") for n in args.names] for kind in args.what},
        )
        for mode in models.MODES
    }
    draw_ratios(
        bars,
        title,
        args.output / "ratios.png",
        f"time / time of {args.reference} (below 1: faster than {args.reference})",
    )
    print(f"written to {args.output}: results.json, table.md, ratios.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
