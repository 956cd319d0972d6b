"""Small exported models, written by hand with onnx.helper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halodet.inference.export_metadata import ExportMetadata

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BOXES = np.array([[8, 6, 40, 30], [-5, 10, 20, 70], [50, 20, 50, 40], [30, 12, 80.5, 60.25]], np.float32)
SCORES = np.array([0.9, 0.8, 0.7, 0.4], np.float32)
CLASSES = np.array([1, 0, 1, 1], np.int64)
MASKS = np.random.default_rng(0).random((4, 28, 28)).astype(np.float32)
TYPES = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT, "classes": TensorProto.INT64}


def metadata(**changes: Any) -> ExportMetadata:
    """Description of the models of this module."""
    values: dict[str, Any] = {
        "detector": "GeneralizedRCNN",
        "input_format": "BGR",
        "min_size": 48,
        "max_size": 96,
        "classes": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "outputs": ["boxes", "scores", "classes", "masks"],
        "weights_sha256": "0" * 64,
    }
    return ExportMetadata(**{**values, **changes})


def write_onnx(path: Path, description: ExportMetadata | None, count: int | None = None, **arrays: np.ndarray) -> Path:
    """Write a model that returns constants; its scores are larger by the mean of the first channel / 1e6.

    Args:
        path: the file.
        description: its metadata; None for a file of another program.
        count: number of objects that it returns, which is computed while it runs; by default all.
        arrays: outputs of the model; by default those of this module.
    """
    arrays = arrays or {"boxes": BOXES, "scores": SCORES, "classes": CLASSES, "masks": MASKS}
    constants = [numpy_helper.from_array(array, f"{name}_value") for name, array in arrays.items()]
    constants += [
        numpy_helper.from_array(np.array([0], np.int64), "first"),
        numpy_helper.from_array(np.array(1e-6, np.float32), "factor"),
    ]
    nodes = [
        helper.make_node("Gather", ["image", "first"], ["channel"], axis=0),
        helper.make_node("ReduceMean", ["channel"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "factor"], ["shift"]),
        helper.make_node("Mul", ["shift", "zero"], ["nothing"]),
    ]
    constants.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    if count is not None:
        constants.append(numpy_helper.from_array(np.array([count], np.float32), "given_count"))
        nodes.append(helper.make_node("Add", ["nothing", "given_count"], ["float_count"]))
        nodes.append(helper.make_node("Cast", ["float_count"], ["count"], to=TensorProto.INT64))
    for name, array in arrays.items():
        shift = "shift" if name == "scores" else "nothing"
        if array.dtype == np.int64:
            nodes.append(helper.make_node("Cast", [shift], [f"{name}_shift"], to=TensorProto.INT64))
            shift = f"{name}_shift"
        output = name if count is None or name == "sem_seg" else f"all_{name}"
        nodes.append(helper.make_node("Add", [f"{name}_value", shift], [output]))
        if output != name:
            nodes.append(helper.make_node("Slice", [output, "first", "count", "first"], [name]))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [3, "height", "width"])]
    outputs = [
        helper.make_tensor_value_info(name, TYPES.get(name, TensorProto.FLOAT), [None, *array.shape[1:]])
        for name, array in arrays.items()
    ]
    graph = helper.make_graph(nodes, "constant", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if description is not None:
        helper.set_model_props(model, {"halodet": description.to_json()})
    onnx.save(model, str(path))
    return path
