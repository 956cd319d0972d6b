"""Parameters, FLOPs and activations of a detector, module by module."""

from __future__ import annotations

from halodet.utils.exporting import counting_operations

import torch
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis, parameter_count
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
    parameters = parameter_count(model)
    with counting_operations():
        by_module = flops.by_module(), activations.by_module()
    rows = []
    for row, name in module_rows(model).items():
        # Both counts wrap the model and prefix its module names.
        counts = (parameters[name], *(count[f"model.{name}"] for count in by_module))
        if any(counts):
            rows.append((row, counts[0] / 1e6, counts[1] / 1e9, counts[2] / 1e6))
    return [*rows, ("whole model", parameters[""] / 1e6, flops.total() / 1e9, activations.total() / 1e6)]
