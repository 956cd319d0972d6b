#!/usr/bin/env python3
"""Install Detectron2 from the package index, where it does not exist under its own name.

The one distribution there that carries Detectron2's whole Python package (Apache-2.0, newer than v0.6) is the LabGym wheel, which
holds it as ``LabGym.detectron2``. This script takes that wheel through pip, checks its hash, takes only Detectron2's folder, restores
the import names, and installs the result with pip as an ordinary ``detectron2`` wheel.

A detectron2 that already imports is left alone.
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
LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"  # Apache-2.0, Detectron2's licence as well as ours
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

Detectron2 is a product of Meta, licensed under Apache-2.0. This wheel was made on the machine it is installed on, by halodet's
tools/install_detectron2.py, from the folder LabGym/detectron2 of {SOURCE_WHEEL}
(SHA-256 {SOURCE_SHA256}).

Changes: imports renamed back from LabGym.detectron2 to detectron2; data/common.py samples from a sorted list, because random.sample
refuses sets from Python 3.11 on; operators that need Detectron2's compiled extension say so in one sentence.
"""

# Where a compiled operator is asked for, torch would only say that its namespace has no such attribute.
UNCOMPILED_OPS = f"""\
# Added by halodet's tools/install_detectron2.py: this build has no compiled extension (detectron2._C).
import torch

MESSAGE = (
    "this build of detectron2 has no compiled operators (rotated boxes, deformable convolution); "
    "install a compiled detectron2 to use them: {INSTALL_PAGE}"
)


def _refuse(*args, **kwargs):
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
    _library.impl(_schema.split("(")[0], _refuse, "CompositeExplicitAutograd")
"""

# file -> (text as it comes, text as it must be); each must occur exactly once, or the source is not the one this was written for
PATCHES = {
    "detectron2/data/common.py": (
        "self._rng.sample(self._fallback_candidates, k=1)[0]",
        "self._rng.sample(sorted(self._fallback_candidates), k=1)[0]  # changed by halodet: sample() refuses sets",
    ),
    "detectron2/layers/deform_conv.py": (
        '_msg = "detectron2 is not compiled successfully, please build following the instructions!"',
        "from ._uncompiled_ops import MESSAGE as _msg  # changed by halodet: a sentence that says what to do",
    ),
}


class InstallError(RuntimeError):
    """What went wrong and what to do about it, in one sentence."""


def installed_detectron2() -> str | None:
    """Version and folder of the detectron2 that imports here, or None where there is none.

    Raises:
        InstallError: one is installed but does not import; it is the user's, so it is not replaced.
    """
    if importlib.util.find_spec("detectron2") is None:
        return None
    probe = "import detectron2, detectron2.engine; print(detectron2.__file__)"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if run.returncode != 0:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"a detectron2 is installed but does not import ({reason}): mend it, or remove it with "
            f"'{sys.executable} -m pip uninstall detectron2' and run this again"
        )
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed by pip)"
    return f"detectron2 {version} at {os.path.dirname(run.stdout.strip().splitlines()[-1])}"


def download_source(folder: Path) -> Path:
    """Fetch the LabGym wheel into ``folder`` through pip and check its SHA-256."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--ignore-requires-python",
        "--only-binary=:all:",
    ]
    run = subprocess.run([*command, "--dest", str(folder), SOURCE], capture_output=True, text=True)
    wheel = folder / SOURCE_WHEEL
    if run.returncode != 0 or not wheel.exists():
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"pip could not download {SOURCE} ({reason}): check the network, or install detectron2 as {INSTALL_PAGE} says"
        )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SOURCE_SHA256:
        raise InstallError(f"{SOURCE_WHEEL} has SHA-256 {digest}, expected {SOURCE_SHA256}: it is not used")
    return wheel


def detectron2_files(source: Path) -> dict[str, bytes]:
    """Detectron2's files from the LabGym wheel, by their path in the new wheel, with import names restored."""
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
            raise InstallError(
                f"{name} in {SOURCE_WHEEL} is not as expected ('{old}' occurs {text.count(old)} times, not once)"
            )
        files[name] = text.replace(old, new).encode()
    files["detectron2/layers/_uncompiled_ops.py"] = UNCOMPILED_OPS.encode()
    files["detectron2/layers/__init__.py"] += b"\nfrom . import _uncompiled_ops  # noqa: added by halodet\n"
    return files


def build_wheel(files: dict[str, bytes], folder: Path) -> Path:
    """Write ``files`` as a ``detectron2`` wheel with METADATA, WHEEL and RECORD into ``folder``."""
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
            print(f"{present} is installed already and is left alone.")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            print(f"Downloading {SOURCE_WHEEL}, which carries Detectron2's Python package ...", flush=True)
            source = download_source(Path(folder))
            wheel = build_wheel(detectron2_files(source), Path(folder))
            print(f"Installing {wheel.name} and what it needs ...", flush=True)
            if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(wheel)]).returncode != 0:
                raise InstallError(f"pip could not install {wheel.name}: its message stands above")
        importlib.invalidate_caches()
        print(f"{installed_detectron2()} is installed.")
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
