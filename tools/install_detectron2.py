#!/usr/bin/env python3
"""Install Detectron2's Python package from the package index, which does not have it under its own name.

The LabGym wheel contains the whole package (Apache-2.0, newer than v0.6) as ``LabGym.detectron2``. This script
downloads that wheel with pip, checks its hash, extracts the Detectron2 folder, restores the import names and installs
the result with pip as a ``detectron2`` wheel. A detectron2 that can be imported is left unchanged.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE = "labgym==3.1.2"
SOURCE_WHEEL = "labgym-3.1.2-py3-none-any.whl"
SOURCE_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
VERSION = "0.6+labgym3.1.2"
LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"  # Apache-2.0, also the licence of Detectron2
INSTALL_PAGE = "https://detectron2.readthedocs.io/tutorials/install.html"

METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2's Python package without its compiled operators, repackaged from {SOURCE_WHEEL}
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
Classifier: License :: OSI Approved :: Apache Software License
Requires-Python: >=3.7
Requires-Dist: Pillow>=7.1
Requires-Dist: matplotlib
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: termcolor>=1.1
Requires-Dist: yacs>=0.1.8
Requires-Dist: tabulate
Requires-Dist: cloudpickle
Requires-Dist: tqdm>4.29.0
Requires-Dist: tensorboard
Requires-Dist: fvcore>=0.1.5,<0.1.6
Requires-Dist: iopath>=0.1.7,<0.1.10
Requires-Dist: omegaconf>=2.1,<2.4
Requires-Dist: hydra-core>=1.1
Requires-Dist: packaging
Requires-Dist: setuptools<81
License-File: LICENSE

Detectron2 is a product of Meta, licensed under Apache-2.0. halodet's tools/install_detectron2.py built this wheel
on the machine it is installed on, from the folder LabGym/detectron2 of {SOURCE_WHEEL}
(SHA-256 {SOURCE_SHA256}).

Changes: imports renamed from LabGym.detectron2 to detectron2; data/common.py samples from a sorted list (random.sample
does not accept sets from Python 3.11 on); operators that need the compiled extension raise an error that says so.
"""

# Without these definitions PyTorch reports only that its operator namespace has no such attribute.
UNCOMPILED_OPS = f"""\
# Added by halodet's tools/install_detectron2.py: this build has no compiled extension (detectron2._C).
import torch

MESSAGE = (
    "this build of detectron2 has no compiled operators (rotated boxes, deformable convolution); "
    "install a compiled detectron2 to use them: {INSTALL_PAGE}"
)


def _raise(*args, **kwargs):
    raise RuntimeError(MESSAGE)


_library = torch.library.Library("detectron2", "DEF")
for _schema in (
    "nms_rotated(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
    "roi_align_rotated_forward(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width,"
    " int sampling_ratio) -> Tensor",
    "roi_align_rotated_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, int pooled_width,"
    " int batch_size, int channels, int height, int width, int sampling_ratio) -> Tensor",
):
    _library.define(_schema)
    _library.impl(_schema.split("(")[0], _raise, "CompositeExplicitAutograd")
"""

# File -> (original text, replacement); each original must occur exactly once.
PATCHES = {
    "detectron2/data/common.py": (
        "self._rng.sample(self._fallback_candidates, k=1)[0]",
        "self._rng.sample(sorted(self._fallback_candidates), k=1)[0]  # changed by halodet: sample() rejects sets",
    ),
    "detectron2/layers/deform_conv.py": (
        '_msg = "detectron2 is not compiled successfully, please build following the instructions!"',
        "from ._uncompiled_ops import MESSAGE as _msg  # changed by halodet: names the fix",
    ),
}


class InstallError(RuntimeError):
    """Detectron2 cannot be installed."""


def installed_detectron2() -> str | None:
    """Return version and folder of the installed detectron2, or None.

    Raises:
        InstallError: a detectron2 is installed but cannot be imported; it is not replaced.
    """
    if importlib.util.find_spec("detectron2") is None:
        return None
    probe = "import detectron2, detectron2.engine; print(detectron2.__file__)"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if run.returncode != 0:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"the installed detectron2 cannot be imported ({reason}). Fix: repair it, or run "
            f"'{sys.executable} -m pip uninstall detectron2' and this script again"
        )
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed by pip)"
    return f"detectron2 {version} at {os.path.dirname(run.stdout.strip().splitlines()[-1])}"


def download_source(folder: Path) -> Path:
    """Download the LabGym wheel to ``folder`` with pip and check its SHA-256."""
    options = ["--quiet", "--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, SOURCE]
    run = subprocess.run(command, capture_output=True, text=True)
    wheel = folder / SOURCE_WHEEL
    if run.returncode != 0 or not wheel.exists():
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"pip could not download {SOURCE} ({reason}). "
            f"Fix: check the network, or install detectron2 as described at {INSTALL_PAGE}"
        )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SOURCE_SHA256:
        raise InstallError(f"{SOURCE_WHEEL} has SHA-256 {digest}, expected {SOURCE_SHA256}")
    return wheel


def detectron2_files(source: Path) -> dict[str, bytes]:
    """Return path in the new wheel -> content of Detectron2's files, with import names restored and patches applied."""
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(source) as wheel:
        for name in wheel.namelist():
            if name.startswith("LabGym/detectron2/") and not name.endswith("/"):
                data = wheel.read(name)
                if name.endswith(".py"):
                    data = data.replace(b"LabGym.detectron2", b"detectron2")
                files[name.removeprefix("LabGym/")] = data
    for name, (old, new) in PATCHES.items():
        text = files[name].decode()
        if text.count(old) != 1:
            raise InstallError(f"{name} in {SOURCE_WHEEL} has {text.count(old)} occurrences of {old!r}, expected 1")
        files[name] = text.replace(old, new).encode()
    files["detectron2/layers/_uncompiled_ops.py"] = UNCOMPILED_OPS.encode()
    files["detectron2/layers/__init__.py"] += b"\nfrom . import _uncompiled_ops  # noqa: added by halodet\n"
    return files


def build_wheel(files: dict[str, bytes], folder: Path) -> Path:
    """Write a ``detectron2`` wheel of ``files`` with its metadata to ``folder``."""
    info = f"detectron2-{VERSION}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": METADATA.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: halodet\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/licenses/LICENSE": LICENSE.read_bytes(),
        f"{info}/top_level.txt": b"detectron2\n",
    }
    record = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(data)}")
    record.append(f"{info}/RECORD,,")
    path = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr(f"{info}/RECORD", "\n".join(record) + "\n")
    return path


def main() -> int:
    try:
        present = installed_detectron2()
        if present:
            print(f"{present} is already installed.")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            print(f"Downloading {SOURCE_WHEEL}, which contains Detectron2's Python package ...", flush=True)
            source = download_source(Path(folder))
            wheel = build_wheel(detectron2_files(source), Path(folder))
            print(f"Installing {wheel.name} and its dependencies ...", flush=True)
            if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(wheel)]).returncode != 0:
                raise InstallError(f"pip could not install {wheel.name}, see its message above")
        importlib.invalidate_caches()
        print(f"Installed {installed_detectron2()}.")
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
