#!/usr/bin/env python3
"""Compare time and memory of halo attention layers: halodet, timm, halonet-pytorch and FlexAttention.

    python tools/benchmark_attention.py                         # feature maps of 800×1333 and 1024×1024 images, batch 1
    python tools/benchmark_attention.py --batch 1 2 8 --device cuda --dtype bfloat16
    python tools/benchmark_attention.py --operators --memory    # all mixers on feature maps of an 800×1333 image
    python tools/benchmark_attention.py --operators elsa halo --stride 16

Every layer is timed with its projections, forward and forward+backward, all in turns in one process. Times are medians,
ratios (time / time of halodet) medians over rounds. Layers that need a multiple of the block size get a padded map.
On a GPU the times are those of CUDA graph replays, which exclude what Python takes to launch kernels; a layer that
cannot be captured is marked. Peak memory is that of one call, with its gradients, beyond weights and input. Exit code 1
if a case failed with halodet.

With --operators, all mixers are timed instead, each beside the straightforward form of its paper with the same weights,
a lower bound, and a 3×3 convolution. Multiply-adds are those of the definition. The lower bound is the time of the
mixer's matrix products, convolutions and softmax alone and of one multiply-add per tap; for training three times that.
Forms that would need a tensor of more than 2 GiB are skipped.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from halodet.attention import BACKENDS, BORDERS
from halodet.benchmark.attention import (
    BLOCKS,
    CHANNELS,
    IMPLEMENTATIONS,
    MODES,
    Case,
    build_call,
    is_installed,
    make_cases,
)
from halodet.benchmark.measure import compare, geometric_mean, keep_freed_memory
from halodet.benchmark.operators import (
    FORMS,
    failed_with_halodet,
    measure_operator,
    operator_cases,
    operator_names,
    operator_table,
)
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

import torch
from tabulate import tabulate


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="*", choices=operator_names(), metavar="NAME",
                        help=f"compare mixers (default: all): {', '.join(operator_names())}")  # fmt: skip
    parser.add_argument("--size", nargs="+", type=int_tuple("x", 1, 1), metavar="HxW",
                        help="image sizes (default: 800x1333 1024x1024; with --operators 800x1333)")  # fmt: skip
    parser.add_argument("--stride", nargs="+", type=int, default=list(CHANNELS), choices=CHANNELS,
                        help="strides of the feature maps (default: 8 16 32)")  # fmt: skip
    parser.add_argument("--map", nargs="+", type=int_tuple("x", 8, 1, 1), metavar="CxHxW",
                        help="feature maps, instead of --size and --stride; C divisible by 8")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=positive_int, default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--block", nargs="+", type=int_tuple(",", 1, 0), default=list(BLOCKS), metavar="B,H",
                        help="block and halo sizes (default: those of the known networks)")  # fmt: skip
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS,
                        help="default: all that are installed; flex-attention on a GPU only")  # fmt: skip
    parser.add_argument("--border", choices=BORDERS, default="zero", help="of halodet (default: zero, as timm)")
    parser.add_argument("--backend", choices=["auto", *BACKENDS], default="auto", help="of halodet (default: auto)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add_common_arguments(parser, "output/benchmark_attention")
    args = parser.parse_args(argv)
    if args.operators is not None:
        for name in ("block", "implementations", "border", "backend"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"argument --{name}: not allowed with argument --operators")
    args.size = args.size or [(800, 1333), (1024, 1024)][: 1 if args.operators is not None else 2]
    if args.map and any(size[0] % 8 for size in args.map):
        parser.error("argument --map: expected a number of channels divisible by 8")
    on_gpu = args.device.type == "cuda"
    default = [name for name in IMPLEMENTATIONS if is_installed(name) and (on_gpu or name != "flex-attention")]
    missing = [name for name in args.implementations or () if not is_installed(name)]
    if missing:
        parser.error(f"argument --implementations: not installed: {missing}. Fix: pip install {' '.join(missing)}")
    args.names = list(dict.fromkeys(["halodet", *(args.implementations or default)]))
    args.dtype = getattr(torch, args.dtype)
    return args


def measure(case: Case, args: argparse.Namespace) -> dict[str, dict[str, dict]]:
    """Return mode -> implementation -> figures of one case."""
    results = {}
    for mode in MODES:
        arguments = {n: (n, case, mode, args.border, args.backend, args.device, args.dtype) for n in args.names}
        builders = {name: partial(build_call, *values) for name, values in arguments.items()}
        results[mode] = compare(builders, reference="halodet", rounds=args.rounds, device=args.device, use_graph=True)
        for name, figures in results[mode].items():
            if args.memory and "failed" not in figures:
                figures |= peak_memory(build_call, *arguments[name], device=args.device)
    return results


def make_table(results: dict[str, dict], names: list[str]) -> str:
    """Format one row per case and mode, the geometric means of the ratios, and the errors."""
    rows = [[c, m, *(format_figures(r[m][n]) for n in names)] for c, r in results.items() for m in MODES]
    for mode in MODES:
        row = ["geometric mean of ratios", mode]
        for name in names:
            ratios = [r[mode][name]["ratio"] for r in results.values() if "ratio" in r[mode][name]]
            row.append(f"{geometric_mean(ratios):.2f}× (min {min(ratios):.2f}×)" if ratios else "failed")
        rows.append(row)
    errors = [f"{c}, {m}, {n}: {f['failed']}" for c, r in results.items() for m in MODES for n, f in r[m].items()
              if "failed" in f]  # fmt: skip
    return "\n\n".join([tabulate(rows, ["batch×C×H×W", "", *names], tablefmt="github"), *errors])


def compare_operators(args: argparse.Namespace) -> int:
    """Run the mode --operators; return the exit code."""
    maps = args.map or [(c.channels, c.height, c.width) for c in make_cases(args.size, args.stride, [1], [(1, 0)])]
    cases = list(operator_cases(args.operators or operator_names(), args.batch, maps))
    timing = describe_timing(args.device, args.rounds, use_graph=True)
    title = f"{describe_machine(args.device)}, {args.dtype}, {timing}"
    print(title)
    results: dict[str, dict] = {}
    for i, case in enumerate(cases, 1):
        results[str(case)] = result = measure_operator(
            case, rounds=args.rounds, memory=args.memory, device=args.device, dtype=args.dtype
        )
        save_results(args.output, title, results)
        figures = (f"{mode} {form} {format_figures(f)}" for mode in MODES for form, f in result[mode].items())
        print(f"{i}/{len(cases)} {case}: {'; '.join(figures)}", flush=True)
    panels = {
        mode: (list(results), {f: [r[mode].get(f, {}).get("ratio") for r in results.values()] for f in FORMS})
        for mode in MODES
    }
    write_report(args.output, title, operator_table(results, cases), panels, "halodet")
    return int(any(failed_with_halodet(r) for r in results.values()))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    keep_freed_memory()
    if args.operators is not None:
        return compare_operators(args)
    cases = make_cases(args.size, args.stride, args.batch, args.block)
    if args.map:
        cases = [Case(batch, *size, *block) for batch in args.batch for size in args.map for block in args.block]
    timing = describe_timing(args.device, args.rounds, use_graph=True)
    title = f"{describe_machine(args.device)}, {args.dtype}, border={args.border!r}, {timing}"
    print(title)
    results: dict[str, dict] = {}
    for i, case in enumerate(cases, 1):
        results[str(case)] = result = measure(case, args)
        save_results(args.output, title, results)
        figures = (f"{mode} {name} {format_figures(result[mode][name])}" for mode in MODES for name in args.names)
        print(f"{i}/{len(cases)} {case}: {'; '.join(figures)}", flush=True)
    panels = {
        mode: (list(results), {n: [r[mode][n].get("ratio") for r in results.values()] for n in args.names})
        for mode in MODES
    }
    write_report(args.output, title, make_table(results, args.names), panels, "halodet")
    return int(any("failed" in r[mode]["halodet"] for r in results.values() for mode in MODES))


if __name__ == "__main__":
    sys.exit(main())
