"""Runtimes of exported models: ONNX Runtime, OpenVINO and TorchScript, each imported on first use."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from halodet.inference.export_metadata import METADATA_KEY, TORCHSCRIPT_FILE, ExportedModelError, ExportMetadata

import numpy as np

__all__ = ["INPUT", "LoadedModel", "load_model", "one_line"]

INPUT = "image"


class LoadedModel(NamedTuple):
    """A model that a runtime has loaded.

    Attributes:
        metadata: its description.
        run: function from a (3, H, W) float32 image, or (B, 3, H, W) images of a backbone, to name -> output.
    """

    metadata: ExportMetadata
    run: Callable[[np.ndarray], dict[str, np.ndarray]]


def load_model(file: str | os.PathLike[str], num_threads: int | None = None) -> LoadedModel:
    """Load an exported model with the runtime of its suffix.

    Args:
        file: .onnx, .xml (OpenVINO, with a .bin file of the same name) or .torchscript file.
        num_threads: number of CPU threads; by default the runtime chooses it.

    Raises:
        ExportedModelError: the file is missing, broken, or not written by halodet, its runtime is not installed, or it
            needs a newer halodet or runtime.
    """
    path = Path(file)
    loaders = {".onnx": _load_onnx, ".xml": _load_openvino, ".torchscript": _load_torchscript}
    loader = loaders.get(path.suffix.lower())
    if loader is None:
        reason = " (torch.export.load reads .pt2 files)" if path.suffix.lower() == ".pt2" else ""
        fix = f" Fix: --config-file {path}." if path.is_dir() else ""
        raise ExportedModelError(f"{path} is invalid: expected a file {', '.join(loaders)}{reason}.{fix}")
    needed = [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]
    for part in needed:
        if not part.is_file():
            beside = f" beside {path.name}" if part != path else ""
            raise ExportedModelError(f"{part} does not exist: expected a file of the exported model{beside}.")
    return loader(path, num_threads)


def _load_onnx(path: Path, num_threads: int | None) -> LoadedModel:
    runtime = _import("onnxruntime", path)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised as well
    options.intra_op_num_threads = num_threads or 0
    # Threads that wait for work would take the CPUs of those that read and draw.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    available = runtime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions have no common base
        raise _broken(path, f"onnxruntime {runtime.__version__}", error) from error
    metadata = _read_metadata(path, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    _check_names(path, metadata, inputs, outputs)
    names = list(metadata.outputs)

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {INPUT: image}), strict=True))

    return LoadedModel(metadata, run)


def _load_openvino(path: Path, num_threads: int | None) -> LoadedModel:
    runtime = _import("openvino", path)
    # By default OpenVINO computes in bfloat16 on CPUs that support it.
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    config |= {"INFERENCE_NUM_THREADS": str(num_threads)} if num_threads else {}
    version = f"openvino {runtime.get_version().split('-')[0]}"
    try:
        model = runtime.Core().read_model(path)
        text = model.get_rt_info([METADATA_KEY]).astype(str) if model.has_rt_info([METADATA_KEY]) else None
    except Exception as error:
        raise _broken(path, version, error) from error
    metadata = _read_metadata(path, text)
    outputs = {name: index for index, output in enumerate(model.outputs) for name in output.get_names()}
    _check_names(path, metadata, [name for value in model.inputs for name in value.get_names()], list(outputs))
    try:
        compiled = runtime.compile_model(model, "CPU", config)
    except Exception as error:
        raise _broken(path, version, error) from error

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        request = compiled.create_infer_request()  # one per call: a request serves one thread
        request.infer({INPUT: image})
        return {name: request.get_output_tensor(outputs[name]).data.copy() for name in metadata.outputs}

    return LoadedModel(metadata, run)


def _load_torchscript(path: Path, num_threads: int | None) -> LoadedModel:
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torchvision")  # registers its operators
    except ImportError as error:
        raise ExportedModelError(f"{path} needs PyTorch ({error}). Fix: pip install 'halodet[train]'.") from error
    if num_threads:
        torch.set_num_threads(num_threads)
    files = {TORCHSCRIPT_FILE: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
            model = torch.jit.load(str(path), map_location="cpu", _extra_files=files).eval()
    except Exception as error:
        raise _broken(path, f"torch {torch.__version__}", error) from error
    text = files[TORCHSCRIPT_FILE]
    metadata = _read_metadata(path, text.decode("utf-8") if isinstance(text, bytes) else text)

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            result = model(torch.from_numpy(image))
        result = (result,) if isinstance(result, torch.Tensor) else result
        return {name: value.numpy() for name, value in zip(metadata.outputs, result, strict=True)}

    return LoadedModel(metadata, run)


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportedModelError(f"{path} needs {module} ({error}). Fix: pip install 'halodet[runtime]'.") from error


def _read_metadata(path: Path, text: str | None) -> ExportMetadata:
    if not text:
        raise ExportedModelError(f"{path} has no halodet metadata: expected a model that halodet exported.")
    try:
        return ExportMetadata.from_json(text)
    except ExportedModelError as error:
        raise ExportedModelError(f"{path}: {error}") from error


def _check_names(path: Path, metadata: ExportMetadata, inputs: list[str], outputs: list[str]) -> None:
    if INPUT not in inputs:
        raise ExportedModelError(f"{path} has the inputs {json.dumps(inputs)}: expected {json.dumps(INPUT)}.")
    missing = [name for name in metadata.outputs if name not in outputs]
    if missing:
        raise ExportedModelError(f"{path} has no output {missing[0]}: expected those of its metadata.")


def _broken(path: Path, runtime: str, error: Exception) -> ExportedModelError:
    return ExportedModelError(
        f"{path} cannot be loaded by {runtime}: {one_line(error)}. Fix: export the model again, or update the runtime."
    )


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters."""
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return message if len(message) <= 300 else f"{message[:300]}..."
