"""Exported files as functions of one array, to compare backbones with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Run = Callable[[np.ndarray], list[np.ndarray]]


def open_backbone(path: Path, form: str) -> Run:
    """Open an exported backbone as a function from images (B, 3, H, W) to its feature maps."""
    return {"onnx": _onnx, "openvino": _openvino, "torchscript": _torchscript, "pt2": _pt2}[form](path)


def _onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})


def _openvino(path: Path) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [np.array(x) for x in compiled([images]).values()]


def _torchscript(path: Path) -> Run:
    return _of_module(torch.jit.load(str(path)))


def _pt2(path: Path) -> Run:
    return _of_module(torch.export.load(str(path)).module())


def _of_module(module: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> Run:
    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [x.numpy() for x in module(torch.from_numpy(images))]

    return run
