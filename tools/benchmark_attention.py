#!/usr/bin/env python3
"""Time and memory of halo attention layers, side by side: halodet's, timm's, halonet-pytorch's and FlexAttention's, as far as installed.

    python tools/benchmark_attention.py                         # the maps of 800×1333 and 1024×1024 images, batch 1
    python tools/benchmark_attention.py --batch 1 2 8 --device cuda --dtype bfloat16

Every layer is timed with its projections, forward and training (forward and backward), in turns in one process; figures are medians, and
ratios medians over rounds. Layers that take whole blocks only get a padded map. Peak memory is what one call needs beyond its input, on
the CPU in a fresh process each. The fraction of the bound is what the machine needs at the least (its measured rate of matrix products
and of copies, for the operations and bytes no implementation can leave out) over the time taken.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

from halodet.benchmark import attention
from halodet.benchmark.chart import draw_ratios
from halodet.benchmark.measure import (
    geometric_mean,
    interleave,
    measure_machine,
    peak_memory,
    ratio,
    use_even_allocator,
)

import torch
from tabulate import tabulate

OURS = "halodet"
MODES = ("forward", "training")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", nargs="+", default=["800x1333", "1024x1024"], metavar="HxW", help="of images (800x1333 1024x1024)"
    )
    parser.add_argument(
        "--stride",
        nargs="+",
        type=int,
        default=[8, 16, 32],
        choices=sorted(attention.CHANNELS),
        help="of maps (8 16 32)",
    )
    parser.add_argument(
        "--map", nargs="+", default=[], metavar="CxHxW", help="maps to use in place of --size and --stride"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images (1)")
    parser.add_argument(
        "--block",
        nargs="+",
        metavar="B,H",
        default=[f"{b},{h}" for b, h in attention.BLOCKS],
        help="block and halo sizes",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=list(attention.CONTENDERS),
        help="all that are installed; on the CPU not flex",
    )
    parser.add_argument(
        "--border", choices=("zero", "mask"), default="zero", help="of halodet; zero is what timm computes (zero)"
    )
    parser.add_argument("--backend", default="auto", help="of halodet (auto)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of maps and weights (float32)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each (7)")
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory too; on the CPU a process starts for each figure"
    )
    parser.add_argument(
        "--system-allocator", action="store_true", help="keep glibc's way with large blocks; by default all are reused"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/benchmark_attention"), metavar="FOLDER", help="for what is measured"
    )
    args = parser.parse_args(argv)
    try:
        args.sizes = [tuple(map(int, size.split("x"))) for size in args.size]
        args.blocks = [tuple(map(int, block.split(","))) for block in args.block]
        args.maps = [tuple(map(int, size.split("x"))) for size in args.map]
    except ValueError:
        parser.error("--size wants HEIGHTxWIDTH, --map CHANNELSxHEIGHTxWIDTH and --block BLOCK,HALO in whole numbers")
    if any(len(x) != 2 or min(x) < 1 for x in args.sizes) or any(
        len(x) != 3 or min(x) < 1 or x[0] % 8 for x in args.maps
    ):
        parser.error(
            "--size wants HEIGHTxWIDTH and --map CHANNELSxHEIGHTxWIDTH, each at least 1, and channels that 8 heads divide"
        )
    if any(len(x) != 2 or x[0] < 1 or x[1] < 0 for x in args.blocks):
        parser.error("--block wants BLOCK,HALO, a block of at least 1 and a halo of at least 0")
    if min(*args.batch, args.rounds) < 1:
        parser.error("--batch and --rounds must be at least 1")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but PyTorch sees no GPU here: take cpu")
    usual = [name for name in attention.CONTENDERS if name != "flex-attention" or args.device != "cpu"]
    wanted = args.contenders or [name for name in usual if attention.available(name)]
    missing = [name for name in wanted if not attention.available(name)]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
    args.names = [OURS, *(name for name in wanted if name != OURS)]
    return args


def measure(setting: attention.Setting, args: argparse.Namespace, machine) -> dict:
    """Everything about one setting: mode -> contender -> figures."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    result: dict = {}
    for mode in MODES:
        calls, failed = {}, {}
        for name in args.names:
            try:
                call = attention.build_call(name, setting, mode, args.border, args.backend, device, dtype)
                call()
                calls[name] = call
            except (RuntimeError, NotImplementedError) as error:  # what another cannot do is a result
                if name == OURS:
                    raise
                failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        seconds = interleave(calls, rounds=args.rounds, device=device)
        operations, moved = setting.work(dtype.itemsize, train=mode == "training")
        result[mode] = {name: {"failed": reason} for name, reason in failed.items()}
        for name, times in seconds.items():
            figures = result[mode][name] = {"ms": statistics.median(times) * 1e3, "ratio": ratio(times, seconds[OURS])}
            # the fraction of the bound by operations, by bytes, and by whichever is higher
            figures["of_operations"] = operations / machine.matrix_rate / statistics.median(times)
            figures["of_bytes"] = moved / machine.copy_rate / statistics.median(times)
            figures["of_bound"] = max(figures["of_operations"], figures["of_bytes"])
        del calls
        if args.memory:
            for name in seconds:
                peak = peak_memory(
                    attention.build_call, name, setting, mode, args.border, args.backend, device, dtype, device=device
                )
                result[mode][name]["peak_mib"] = None if peak is None else peak / 2**20
    return result


def line(mode: str, result: dict[str, dict], names: list[str]) -> str:
    """One mode of one setting in a few words."""
    others = "".join(f", {name} {result[name].get('ratio', float('nan')):.2f}×" for name in names[1:])
    return f"{mode} {result[OURS]['ms']:.1f} ms{others}"


def table(results: dict[str, dict], names: list[str]) -> str:
    """One row per setting and mode, and the means over all settings at the end."""
    rows = []
    for setting, result in results.items():
        for mode in MODES:
            row = [setting, mode]
            for name in names:
                figures = result[mode].get(name, {"failed": ""})
                if "failed" in figures:
                    row.append("failed")
                    continue
                text = f"{figures['ms']:.1f} ms"
                text += f", {figures['of_bound']:.0%} of bound" if name == OURS else f" ({figures['ratio']:.2f}×)"
                if figures.get("peak_mib") is not None:
                    text += f", {figures['peak_mib']:.0f} MiB"
                row.append(text)
            rows.append(row)
    for mode in MODES:
        row = [f"{len(results)} settings", mode, ""]
        for name in names[1:]:
            ratios = [result[mode][name]["ratio"] for result in results.values() if "ratio" in result[mode][name]]
            row.append(
                f"geometric mean {geometric_mean(ratios):.2f}×, least {min(ratios):.2f}×" if ratios else "failed"
            )
        rows.append(row)
    return tabulate(rows, ["batch×C×H×W", "", *names], tablefmt="github")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if argv is None and args.device == "cpu" and not args.system_allocator:
        use_even_allocator()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.maps:
        todo = [
            attention.Setting(batch, *m, *block) for batch in args.batch for m in args.maps for block in args.blocks
        ]
    else:
        todo = attention.settings(args.sizes, args.stride, args.batch, args.blocks)
    machine = measure_machine(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"{name}, {args.dtype}, PyTorch {torch.__version__}, Python {platform.python_version()}; measured peak: "
        f"{machine.matrix_rate / 1e9:.0f} Gop/s in matrix products, {machine.copy_rate / 1e9:.1f} GB/s in copies; "
        f"halodet with border {args.border!r}"
    )
    print(title)
    results: dict[str, dict] = {}
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for i, setting in enumerate(todo, 1):
        try:
            results[str(setting)] = result = measure(setting, args, machine)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        left = (time.monotonic() - start) / i * (len(todo) - i)
        figures = "; ".join(line(mode, result[mode], args.names) for mode in MODES)
        print(f"{i}/{len(todo)} {setting}: {figures}; about {left / 60:.0f} min left", flush=True)
        # written after every setting, so that an interrupted run has lost nothing
        (args.output / "results.json").write_text(
            json.dumps({"machine": title, "results": results}, indent=1), encoding="utf-8"
        )
    text = table(results, args.names)
    for setting, result in results.items():
        for mode in MODES:
            text += "".join(
                f"\n{setting}, {mode}: {n}: {r['failed']}" for n, r in result[mode].items() if "failed" in r
            )
    print(text)
    (args.output / "table.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    labels = list(results)
    panels = {
        mode: (labels, {n: [r[mode][n].get("ratio") for r in results.values()] for n in args.names[1:]})
        for mode in MODES
    }
    if args.names[1:]:
        draw_ratios(panels, title, args.output / "ratios.png")
    print(f"written to {args.output}: results.json, table.md" + (", ratios.png" if args.names[1:] else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
