"""Writers of the exported formats. A file is complete or absent."""

from __future__ import annotations

import errno
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from halodet.export.detector import ExportableBackbone, ExportableDetector, ExportError
from halodet.export.quantization import quantize
from halodet.inference.export_metadata import METADATA_KEY, SUFFIXES, TORCHSCRIPT_FILE, ExportMetadata
from halodet.utils.import_errors import is_installed

import numpy as np
import torch
from detectron2.export.torchscript_patch import patch_builtin_len

OPSET = 17  # the newest of PyTorch's exporter that traces
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
    calibration: Iterable[np.ndarray] | None = None,
    check: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Write a model as ``form``, a key of :data:`FORMATS`, and return the files.

    Args:
        model: the model, on the CPU.
        path: the file to write; OpenVINO's weights go to a ``.bin`` file beside it.
        form: format.
        metadata: what the file says about itself.
        example: an image that the model is traced with; height and width of the graph are dynamic.
        half: store weights in float16.
        calibration: images for int8; None for float.
        check: function that is called with the complete file before the file gets its name. If it raises, an older file
            of this name remains.

    Raises:
        ExportError: see :func:`check_format`; or the model cannot be traced or converted.
        OSError: the file cannot be written.
    """
    path = check_format(path, form, half=half, int8=calibration is not None)
    # A folder beside the file: a rename moves a finished file, and an interrupted export leaves no file of that name.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        target = Path(folder) / path.name
        with warnings.catch_warnings(), torch.no_grad(), patch_builtin_len():
            warnings.simplefilter("ignore")  # of constants in the trace: the file is compared with the model later
            FORMATS[form](model, target, metadata, example, half, calibration)
        files = sorted(Path(folder).iterdir())
        if check is not None:
            check(target)
        _move(files, path.parent)
    return [path.parent / file.name for file in files]


def check_format(path: str | os.PathLike[str], form: str, *, half: bool, int8: bool) -> Path:
    """Check that a file of a format can be written, before the model is loaded, and return its path.

    Raises:
        ExportError: the name, format or precision is invalid, or a package is missing.
    """
    path = Path(path)
    if form not in FORMATS:
        raise ExportError(f"--format {form} is invalid: expected one of {', '.join(FORMATS)}.")
    if path.suffix != SUFFIXES[form]:
        raise ExportError(
            f"--output {path} is invalid for the format {form}: expected a name that ends in {SUFFIXES[form]}."
        )
    if not path.parent.is_dir():
        raise ExportError(f"--output {path} is invalid: there is no folder {path.parent}. Fix: create it.")
    if path.is_dir():
        raise ExportError(f"--output {path} is invalid: it is a folder. Fix: use another name.")
    if half and int8:
        raise ExportError("--half and --int8 are invalid together: expected one of them.")
    if (half or int8) and form not in ("onnx", "openvino"):
        raise ExportError(
            f"{'--half' if half else '--int8'} is invalid for the format {form}: expected onnx or openvino."
        )
    for package in [*_PACKAGES[form], *(["onnxruntime"] if int8 else [])]:
        if not is_installed(package):
            raise ExportError(f"{package} is not installed. Fix: pip install 'halodet[export]'")
    return path


def _move(files: Sequence[Path], folder: Path) -> None:
    """Move files to a folder, all or none: the weights of OpenVINO do not fit the graph of another export."""
    moved: list[Path] = []
    try:
        for file in files:
            target = folder / file.name
            if target.exists():
                os.replace(target, file.with_name(f"old-{file.name}"))
            moved.append(target)
            os.replace(file, target)
    except OSError:
        for target in moved:
            old = files[0].with_name(f"old-{target.name}")
            if old.exists():
                os.replace(old, target)
            else:
                target.unlink(missing_ok=True)
        raise


def _write_onnx(
    model: Model,
    path: Path,
    metadata: ExportMetadata,
    example: torch.Tensor,
    half: bool,
    calibration: Iterable[np.ndarray] | None,
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
    if calibration is not None:
        proto = quantize(proto, calibration, path.parent)
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
    calibration: Iterable[np.ndarray] | None,
) -> None:
    import openvino

    onnx_file = path.with_name("model.onnx")
    _write_onnx(model, onnx_file, metadata, example, False, calibration)
    try:
        converted = openvino.convert_model(str(onnx_file))
    except Exception as error:  # openvino raises its own classes, and RuntimeError
        raise ExportError(f"OpenVINO cannot convert the model: {_first_line(error)}") from error
    converted.set_rt_info(metadata.to_json(), METADATA_KEY)
    try:
        openvino.save_model(converted, str(path), compress_to_fp16=half)
    except RuntimeError as error:  # of a full disk, for example
        raise OSError(errno.EIO, _first_line(error), str(path)) from error
    del converted
    onnx_file.unlink()


def _write_torchscript(model: Model, path: Path, metadata: ExportMetadata, example: torch.Tensor, *_: Any) -> None:
    try:
        traced = torch.jit.trace(model, (example,), check_trace=False)
    except Exception as error:
        raise ExportError(f"The model cannot be traced to TorchScript: {_first_line(error)}") from error
    buffer = io.BytesIO()  # PyTorch's own file writer ends the process if the disk is full
    torch.jit.save(traced, buffer, _extra_files={TORCHSCRIPT_FILE: metadata.to_json()})
    path.write_bytes(buffer.getbuffer())


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
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={TORCHSCRIPT_FILE: metadata.to_json()})
    path.write_bytes(buffer.getbuffer())


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
