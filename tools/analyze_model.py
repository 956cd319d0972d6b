#!/usr/bin/env python3
"""Parameters, FLOPs and activations of a config's model, stage by stage, at any input size.

    python tools/analyze_model.py --config-file configs/mask_rcnn_halo_h4.yaml --size 800 1333

FLOPs are counted by fvcore for one image: one multiply-add is one FLOP; sums, activations and softmax are not counted. Activations are
the elements that convolutions and matrix products put out. What the heads cost depends on how many proposals there are: at most
MODEL.RPN.POST_NMS_TOPK_TEST for boxes, TEST.DETECTIONS_PER_IMAGE for masks.
"""

from __future__ import annotations

import argparse
import logging
import sys

from halodet.engine import load_config
from halodet.errors import ConfigError

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis, parameter_count
from tabulate import tabulate
from torch import nn

STAGES = ("stem", "res2", "res3", "res4", "res5", *(f"stages.{i}" for i in range(4)), "final_conv")  # the latter timm's


def parts(model: nn.Module) -> dict[str, str]:
    """Name of each row -> name of the module in the model; a part of the backbone stands before the backbone itself."""
    rows = {}
    bottom_up = "backbone.bottom_up" if hasattr(model.backbone, "bottom_up") else "backbone"
    there = {name for name, _ in model.named_modules()}
    rows.update({stage: f"{bottom_up}.{stage}" for stage in STAGES if f"{bottom_up}.{stage}" in there})
    rows["backbone"] = bottom_up
    if bottom_up != "backbone":
        rows["backbone with FPN"] = "backbone"
    rows.update({name: name for name, _ in model.named_children() if name != "backbone"})
    return rows


def analyze(model: nn.Module, height: int, width: int) -> list[tuple[str, float, float, float]]:
    """(part, million parameters, GFLOPs, million activations) for one image of ``height`` × ``width`` pixels, and the whole at the end."""
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    inputs = [{"image": image.to(model.device), "height": height, "width": width}]
    flops = FlopCountAnalysis(model, inputs)
    adapter = TracingAdapter(model, inputs, allow_non_tensor=True)
    activations = ActivationCountAnalysis(adapter, adapter.flattened_inputs)
    for count in (flops, activations):
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    parameters = parameter_count(model)
    # both counts wrap the model, so that its modules are "model.…" there
    rows = [
        (
            row,
            parameters[name] / 1e6,
            flops.by_module()[f"model.{name}"] / 1e9,
            activations.by_module()[f"model.{name}"] / 1e6,
        )
        for row, name in parts(model).items()
    ]
    rows = [row for row in rows if any(row[1:])]  # anchor generators and the like cost nothing
    return [*rows, ("whole model", parameters[""] / 1e6, flops.total() / 1e9, activations.total() / 1e6)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="path to a config file, or its name in halodet's configs"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, default=(800, 1333), metavar=("HEIGHT", "WIDTH"), help="of the image (800 1333)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides KEY VALUE ...")
    args = parser.parse_args(argv)
    try:
        if min(args.size) < 1:
            raise ConfigError(
                f"--size is {args.size[0]} {args.size[1]}, expected a height and a width of at least 1 pixel"
            )
        cfg = load_config(args.config_file, args.opts)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    print(f"{args.config_file} at {args.size[0]}×{args.size[1]}, one image")
    headers = ["", "parameters (M)", "GFLOPs", "activations (M)"]
    print(tabulate(analyze(model, *args.size), headers, tablefmt="github", floatfmt=".2f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
