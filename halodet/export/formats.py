"""Writers of the exported formats. A file is complete or absent."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halodet.export.detector import ExportableBackbone, ExportableDetector, ExportError
from halodet.export.quantization import quantize
from halodet.inference.export_metadata import METADATA_KEY, TORCHSCRIPT_FILE, ExportMetadata
from halodet.utils.import_errors import is_installed

import numpy as np
import torch
from detectron2.export.torchscript_patch import patch_builtin_len

OPSET = 17  # the newest of PyTorch's exporter that traces
SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript", "openvino": ".xml", "pt2": ".pt2"}
_PACKAGES = {"onnx": ["onnx", "onnxruntime"], "openvino": ["onnx", "openvino"], "torchscript": [], "pt2": []}
_MIN_HALF = 1024  # elements; shapes, scales and other small constants stay in float32

Model = ExportableDetector | ExportableBackbone


def export_model(
    model: Model,
    path: str | os.PathLike[str],
    form: str,
    metadata: ExportMetadata,
    example: torch.Tensor,
    *,
    half: bool = False,
    calibration: Sequence[np.ndarray] = (),
) -> list[Path]:
    """Write a model as ``form``, a key of :data:`FORMATS`, and return the files.

    Args:
        model: the model, on the CPU.
        path: the file to write; OpenVINO's weights go to a ``.bin`` file beside it.
        form: format.
        metadata: what the file says about itself.
        example: an image that the model is traced with; height and width of the graph are dynamic.
        half: store weights in float16.
        calibration: images for int8; with none, the file is not quantized.

    Raises:
        ExportError: the form cannot hold the model, a package is missing, or the model cannot be traced.
        OSError: the file cannot be written.
    """
    if form not in FORMATS:
        raise ExportError(f"format={form!r} is invalid: expected one of {', '.join(FORMATS)}")
    path = Path(path)
    if path.suffix != SUFFIXES[form]:
        raise ExportError(f"{path} is invalid for the format {form}: expected a name that ends in {SUFFIXES[form]}")
    if (half or calibration) and form not in ("onnx", "openvino"):
        raise ExportError(f"{'half' if half else 'int8'} is invalid for the format {form}: expected onnx or openvino")
    if half and calibration:
        raise ExportError("half and int8 are invalid together: expected one of them")
    for package in _PACKAGES[form]:
        if not is_installed(package):
            raise ExportError(f"{package} is not installed. Fix: pip install 'halodet[export]'")
    # A folder beside the file: a rename moves a finished file, and an interrupted export leaves no file of that name.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        target = Path(folder) / path.name
        with warnings.catch_warnings(), torch.no_grad(), patch_builtin_len():
            warnings.simplefilter("ignore")  # of constants in the trace: the file is compared with the model later
            FORMATS[form](model, target, metadata, example, half, calibration)
        files = sorted(Path(folder).iterdir())
        for file in files:
            os.replace(file, path.parent / file.name)
    return [path.parent / file.name for file in files]


def _write_onnx(
    model: Model,
    path: Path,
    metadata: ExportMetadata,
    example: torch.Tensor,
    half: bool,
    calibration: Sequence[np.ndarray],
) -> None:
    import onnx

    input_axes = {example.dim() - 2: "height", example.dim() - 1: "width"}
    axes: dict[str, dict[int, str]] = {"image": input_axes if example.dim() == 3 else {0: "batch", **input_axes}}
    for name in model.outputs:
        if isinstance(model, ExportableBackbone):
            axes[name] = {0: "batch", 2: f"{name}_height", 3: f"{name}_width"}
        else:
            axes[name] = {1: "sem_seg_height", 2: "sem_seg_width"} if name == "sem_seg" else {0: "detections"}
    raw = path.with_name(f"raw-{path.name}")
    try:
        torch.onnx.export(
            model,
            (example,),
            str(raw),
            dynamo=False,  # the exporter by torch.export cannot trace the heads
            opset_version=OPSET,
            input_names=["image"],
            output_names=model.outputs,
            dynamic_axes=axes,
        )
    except OSError:
        raise
    except Exception as error:  # tracing runs the model's own code
        raise ExportError(f"The model cannot be traced to ONNX: {_first_line(error)}") from error
    proto = onnx.load(str(raw))
    raw.unlink()
    if calibration:
        proto = quantize(proto, calibration)
    if half:
        _store_in_float16(proto)
    onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.to_json()})
    onnx.save(proto, str(path))


def _write_openvino(
    model: Model,
    path: Path,
    metadata: ExportMetadata,
    example: torch.Tensor,
    half: bool,
    calibration: Sequence[np.ndarray],
) -> None:
    import openvino

    onnx_file = path.with_name("model.onnx")
    _write_onnx(model, onnx_file, metadata, example, False, calibration)
    try:
        converted = openvino.convert_model(str(onnx_file))
    except Exception as error:  # openvino raises its own classes, and RuntimeError
        raise ExportError(f"OpenVINO cannot convert the model: {_first_line(error)}") from error
    converted.set_rt_info(metadata.to_json(), METADATA_KEY)
    openvino.save_model(converted, str(path), compress_to_fp16=half)
    del converted
    onnx_file.unlink()


def _write_torchscript(model: Model, path: Path, metadata: ExportMetadata, example: torch.Tensor, *_: Any) -> None:
    try:
        traced = torch.jit.trace(model, (example,), check_trace=False)
    except Exception as error:
        raise ExportError(f"The model cannot be traced to TorchScript: {_first_line(error)}") from error
    torch.jit.save(traced, str(path), _extra_files={TORCHSCRIPT_FILE: metadata.to_json()})


def _write_pt2(model: Model, path: Path, metadata: ExportMetadata, example: torch.Tensor, *_: Any) -> None:
    if isinstance(model, ExportableDetector):
        raise ExportError(
            "pt2 is invalid for a whole detector: torch.export cannot trace heads whose number of boxes depends on the "
            "image. Fix: export with --backbone-only, or to torchscript or onnx."
        )
    auto = torch.export.Dim.AUTO
    example = torch.cat((example, example))  # a size of 1 would become a constant
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    except Exception as error:
        raise ExportError(f"The model cannot be exported by torch.export: {_first_line(error)}") from error
    torch.export.save(program, str(path), extra_files={TORCHSCRIPT_FILE: metadata.to_json()})


FORMATS: dict[str, Callable[..., None]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
}


def _store_in_float16(proto: Any) -> None:
    """Store large constants in float16; they are cast to float32 when the file is loaded."""
    import onnx
    from onnx import numpy_helper

    casts = []
    for constant in proto.graph.initializer:
        if constant.data_type == onnx.TensorProto.FLOAT and int(np.prod(constant.dims)) >= _MIN_HALF:
            name = constant.name
            values = np.clip(numpy_helper.to_array(constant), *(np.finfo(np.float16).min, np.finfo(np.float16).max))
            constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
            casts.append(onnx.helper.make_node("Cast", [constant.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
