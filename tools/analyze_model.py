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

from halodet.config.load import load_config
from halodet.config.projects import add_project_arguments, import_projects
from halodet.errors import HalodetError

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis, parameter_count
from tabulate import tabulate
from torch import nn

STAGES = ("stem", "res2", "res3", "res4", "res5", *(f"stages.{i}" for i in range(4)), "final_conv")  # ours, then timm's


def module_rows(model: nn.Module) -> dict[str, str]:
    """Return row name -> module name; the stages of the backbone come before the backbone itself."""
    bottom_up = "backbone.bottom_up" if hasattr(model.backbone, "bottom_up") else "backbone"
    modules = {name for name, _ in model.named_modules()}
    rows = {stage: f"{bottom_up}.{stage}" for stage in STAGES if f"{bottom_up}.{stage}" in modules}
    rows["backbone"] = bottom_up
    if bottom_up != "backbone":
        rows["backbone with FPN"] = "backbone"
    return rows | {name: name for name, _ in model.named_children() if name != "backbone"}


def analyze(model: nn.Module, height: int, width: int) -> list[tuple[str, float, float, float]]:
    """Return (name, million parameters, GFLOPs, million activations) per module and for the whole model.

    Args:
        model: detector in inference mode.
        height: image height in pixels.
        width: image width in pixels.
    """
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    inputs = [{"image": image.to(model.device), "height": height, "width": width}]
    flops = FlopCountAnalysis(model, inputs)
    adapter = TracingAdapter(model, inputs, allow_non_tensor=True)
    activations = ActivationCountAnalysis(adapter, adapter.flattened_inputs)
    for count in (flops, activations):
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    parameters, by_module = parameter_count(model), (flops.by_module(), activations.by_module())
    rows = []
    for row, name in module_rows(model).items():
        # Both counts wrap the model and prefix its module names.
        counts = (parameters[name], *(count[f"model.{name}"] for count in by_module))
        if any(counts):
            rows.append((row, counts[0] / 1e6, counts[1] / 1e9, counts[2] / 1e6))
    return [*rows, ("whole model", parameters[""] / 1e6, flops.total() / 1e9, activations.total() / 1e6)]


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
