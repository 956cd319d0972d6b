"""Print versions, devices and missing dependencies: ``python -m halodet.utils.collect_env``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path

from halodet.utils.import_errors import is_installed

INSTALL_DETECTRON2 = (
    "run 'python tools/install_detectron2.py' in a checkout of halodet, or build it: "
    "https://detectron2.readthedocs.io/tutorials/install.html"
)

# Module -> (distribution, fix if it does not import)
REQUIRED = {
    "torch": ("torch", "pip install torch torchvision"),
    "torchvision": ("torchvision", "install torch and torchvision from the same index; their builds must match"),
    "pkg_resources": ("setuptools", "pip install 'setuptools<81' (Detectron2 imports pkg_resources)"),
    "numpy": ("numpy", "pip install numpy"),
    "PIL": ("Pillow", "pip install Pillow"),
    "cv2": ("opencv-python", "pip install opencv-python, or opencv-python-headless if libGL is missing"),
    "pycocotools": ("pycocotools", "pip install pycocotools"),
    "fvcore": ("fvcore", "pip install fvcore"),
    "safetensors": ("safetensors", "pip install safetensors"),
    "detectron2": ("detectron2", INSTALL_DETECTRON2),
}
RUNTIMES = ("onnxruntime", "openvino")
FOR_EXPORTED = ("numpy", "PIL", "cv2")
# Detectron2 imports many dependencies on first use only.
USED = ("detectron2.engine", "halodet.engine", "halodet.inference.predictor")
OPTIONAL = {
    "timm": "pip install 'halodet[timm]' for timm backbones and ImageNet weights",
    "onnxruntime": "pip install 'halodet[runtime]' to run exported .onnx models",
    "openvino": "pip install 'halodet[runtime]' to run exported OpenVINO models",
    "av": "pip install 'halodet[video]' to draw predictions on videos",
    "tensorboard": "pip install tensorboard for TensorBoard logs",
    "triton": "included in PyTorch for CUDA on Linux; needed for the Triton attention kernels on a GPU",
}


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution."""
    for name in (distribution, f"{distribution}-headless"):  # OpenCV has two distributions
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed by pip"


def import_error(module: str) -> str | None:
    """Import a module; return its error in one line, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken build may raise anything
        return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return None


def describe_devices() -> list[str]:
    """Return one line per device that PyTorch can use, with the attention backend of each GPU."""
    import torch

    lines = [f"cpu: {torch.get_num_threads()} threads"]
    triton_ops = importlib.import_module("halodet.attention.triton_ops")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        reason = triton_ops.triton_unavailable_reason(torch.device("cuda", index))
        backend = f"attention backend blocked ({reason})" if reason else "attention backend triton"
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}: {gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}, {backend}")
    return lines


def main() -> int:
    """Print the report; return 1 if a required dependency is missing, else 0.

    Without PyTorch, only what exported models need is required.
    """
    missing: dict[str, tuple[str, str]] = {}  # distribution or module -> (error, fix)

    def line(name: str, text: str) -> None:
        print(f"{name:<16}{text}")

    line("halodet", f"{version_of('halodet')} at {Path(__file__).resolve().parents[1]}")
    line("Python", f"{platform.python_version()} at {sys.executable}")
    runtime_only = any(map(is_installed, RUNTIMES)) and not is_installed("torch")
    for module, (distribution, fix) in REQUIRED.items():
        if runtime_only and module not in FOR_EXPORTED:
            line(distribution, f"{version_of(distribution)} (training only)")
            continue
        if error := import_error(module):
            missing[distribution] = (error, fix)
        line(distribution, f"MISSING ({error})" if error else version_of(distribution))
    for name, hint in OPTIONAL.items():
        line(name, version_of(name) if is_installed(name) else f"not installed (optional: {hint})")
    if "torch" not in missing and not runtime_only:
        for text in describe_devices():
            line("device", text)
    if "detectron2" not in missing and not runtime_only and import_error("detectron2._C"):
        line("detectron2._C", "not compiled: no rotated boxes or deformable convolution (halodet needs neither)")
    datasets = Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))).absolute()
    found = (datasets / "coco" / "annotations" / "instances_val2017.json").is_file()
    line("COCO", f"found in {datasets}" if found else f"not in {datasets} (see datasets/README.md)")
    for module in () if missing or runtime_only else USED:
        if error := import_error(module):
            missing[module] = (error, f"install the package it names, or {INSTALL_DETECTRON2}")
            break
    for name, (error, fix) in missing.items():
        print(f"\nmissing: {name} cannot be imported ({error})\n    fix: {fix}")
    if runtime_only and not missing:
        print("\nExported models can be run. To train and to run checkpoints: pip install 'halodet[train]'")
    else:
        print("\nhalodet is not usable yet." if missing else "\nAll required dependencies are installed.")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
