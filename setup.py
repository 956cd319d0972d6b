import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "halodet/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

# Detectron2 is missing on purpose: the index does not have it under its own name (tools/install_detectron2.py installs
# it), and a user's own build must never be replaced.
TRAIN = [
    "torch>=2.6,<2.16",
    "torchvision>=0.21,<0.30",
    "pycocotools>=2.0.8,<3",
    "safetensors>=0.4,<1",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "tabulate",
    "PyYAML>=6",
    # Detectron2 and fvcore import pkg_resources, which setuptools 81 and later no longer have.
    "setuptools<81",
]
RUNTIME = ["onnxruntime>=1.20,<2", "openvino>=2025.0,<2027"]
ONNX = "onnx>=1.17,<2"
# supervision has no tracker since 0.30: that of trackers replaces it. Neither needs PyTorch.
VIDEO = ["av>=17,<19", "trackers>=2.6,<3", "supervision>=0.26.1,<1"]
API = ["fastapi>=0.115,<1", "uvicorn>=0.34,<1", "python-multipart>=0.0.18,<1"]
APP = [*API, "gradio>=6.31,<7"]
# An editable installation of a package that is elsewhere (halodet.configs) would lose against a folder of the name
# halodet, such as the folder that the clone is in. config_dir() finds the configs of a checkout.
EDITABLE = "editable_wheel" in sys.argv
TIMM = ["timm>=1.0.31,<1.1", "huggingface_hub>=0.23"]  # timm itself asks for any huggingface_hub

setup(
    name="halodet",
    version=VERSION,
    description="HaloNet backbones for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["halodet", "halodet.*"]), *([] if EDITABLE else ["halodet.configs"])],
    package_dir={"": "."} if EDITABLE else {"halodet.configs": "configs"},
    package_data={"halodet": ["py.typed"], "halodet.configs": ["**/*.yaml", "lazy/**/*.py"]},
    # What halodet.inference needs besides a runtime; everything else is in the extra "train".
    install_requires=["numpy>=1.26.4,<3", "Pillow>=11,<14", "opencv-python>=4.10,<6", "tqdm>=4.60"],
    extras_require={
        "train": TRAIN,
        "runtime": RUNTIME,
        "video": VIDEO,
        "export": [*TRAIN, *RUNTIME, ONNX],
        "timm": [*TRAIN, *TIMM],
        "api": API,
        "app": APP,
        "benchmark": [*TRAIN, TIMM[0], "halonet-pytorch>=0.0.5,<0.1"],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"],
        "test": [
            *TRAIN,
            *RUNTIME,
            *VIDEO,
            *APP,
            "playwright>=1.50,<2",  # its tests also need Chromium, and are skipped without it
            "pytest>=8,<9.2",  # pytest-xdist 3.8 ignores its groups with pytest 9.2
            "pytest-xdist>=3.6,<4",
            "mypy>=1.15,<3",
            "ruff>=0.17,<0.18",
            TIMM[0],
            "halonet-pytorch>=0.0.5,<0.1",
            ONNX,
            "onnxscript>=0.3,<1",
        ],
    },
)
