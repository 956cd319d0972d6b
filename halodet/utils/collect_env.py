"""``python -m halodet.utils.collect_env``: the versions that matter, the device, what is missing and the mend for it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from pathlib import Path

INSTALL_DETECTRON2 = (
    "run 'python tools/install_detectron2.py' in a checkout of halodet, or install your own build as "
    "https://detectron2.readthedocs.io/tutorials/install.html says"
)

# module -> (distribution, what to do when it does not import)
NEEDED = {
    "torch": ("torch", "pip install torch torchvision"),
    "torchvision": (
        "torchvision",
        "pip install torchvision",
    ),  # a build for another torch is found, but does not import
    "pkg_resources": ("setuptools", "pip install 'setuptools<81' (Detectron2 still imports pkg_resources)"),
    "numpy": ("numpy", "pip install numpy"),
    "PIL": ("Pillow", "pip install Pillow"),
    "cv2": ("opencv-python", "pip install opencv-python, or opencv-python-headless where libGL is missing"),
    "pycocotools": ("pycocotools", "pip install pycocotools"),
    "fvcore": ("fvcore", "pip install fvcore"),
    "safetensors": ("safetensors", "pip install safetensors"),
    "detectron2": ("detectron2", INSTALL_DETECTRON2),
}
USED = ("detectron2.engine", "halodet.engine", "halodet.inference")
OPTIONAL = {"timm": "timm", "tensorboard": "tensorboard", "triton": "triton"}


def version_of(distribution: str) -> str:
    """Version of an installed distribution, or how it came here where pip does not know it."""
    for name in (distribution, f"{distribution}-headless"):  # OpenCV comes under two names
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed by pip"


def problem_with(module: str) -> str | None:
    """Why ``module`` does not import, in one line; None if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken build can raise anything while it is imported
        return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return None


def devices() -> list[str]:
    """One line for each device PyTorch can use, on a GPU with what computes halo attention there."""
    from halodet.attention.triton_ops import triton_unavailable_reason

    import torch

    lines = [f"cpu: {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        problem = triton_unavailable_reason(torch.device("cuda", index))
        attention = f"attention in plain PyTorch: {problem}" if problem else "attention in Triton"
        lines.append(
            f"cuda:{index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}, {attention}"
        )
    return lines


def main() -> int:
    """Print the report; 0 if halodet can be used, 1 if something it needs is missing."""
    missing: list[tuple[str, str]] = []

    def line(name: str, text: str) -> None:
        print(f"{name:<16}{text}")

    line("halodet", f"{version_of('halodet')} at {Path(__file__).resolve().parent}")
    line("Python", f"{platform.python_version()} at {sys.executable}")
    for module, (distribution, mend) in NEEDED.items():
        problem = problem_with(module)
        if problem:
            if module == "torchvision" and importlib.util.find_spec(module):
                mend = "install torch and torchvision again, both from the same place: a +cpu torch does not fit PyPI's torchvision"
            missing.append((f"{distribution} does not import ({problem})", mend))
        line(distribution, "MISSING" if problem else version_of(distribution))
    for module, distribution in OPTIONAL.items():
        line(distribution, version_of(distribution) if importlib.util.find_spec(module) else "not installed (optional)")
    if not any(name.startswith("torch ") for name, _ in missing):
        for text in devices():
            line("device", text)
    if not any(name.startswith("detectron2") for name, _ in missing) and problem_with("detectron2._C"):
        line("detectron2._C", "not compiled: no rotated boxes and no deformable convolution; halodet needs neither")
    datasets = Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))).absolute()
    coco = datasets / "coco" / "annotations" / "instances_val2017.json"
    line(
        "COCO",
        f"found in {datasets}"
        if coco.is_file()
        else f"not in {datasets} (only its configs need it; see datasets/README.md)",
    )
    if not missing:
        # Detectron2 imports most of what it needs only when it is used.
        for module in USED:
            problem = problem_with(module)
            if problem:
                missing.append(
                    (f"{module} does not import ({problem})", f"install what it names, or {INSTALL_DETECTRON2}")
                )
                break
    for what, mend in missing:
        print(f"\nmissing: {what}\n   mend: {mend}")
    print("\nhalodet cannot be used yet." if missing else "\nAll that halodet needs is here.")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
