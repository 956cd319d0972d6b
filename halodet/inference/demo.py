"""Inference on image files: find them, draw the predictions, and save these as COCO-style JSON."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from halodet.errors import ConfigError, HalodetError, ImageError
from halodet.inference.predictor import Predictor, to_coco
from halodet.inference.visualize import draw_output
from halodet.utils.image_io import read_image
from halodet.utils.io import write_json

import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

__all__ = ["DETECTIONS_FILE", "NOT_IMAGES", "draw_images", "find_images"]

DETECTIONS_FILE = "detections.json"
NOT_IMAGES = frozenset(
    ".bz2 .cfg .csv .doc .docx .gz .htm .html .ini .ipynb .json .jsonl .log .md .mp4 .npy .npz .pdf .pickle .pkl .pth "
    ".pt .py .rst .sh .tar .tgz .toml .tsv .txt .xls .xlsx .xml .yaml .yml .zip".split()
)


def find_images(inputs: Sequence[str], output: str) -> list[str]:
    """List the files that ``inputs`` (files, folders, glob patterns) name, each once, sorted inside folders.

    Folders are searched with their subfolders, without hidden files and files with a suffix in :data:`NOT_IMAGES`.

    Raises:
        ConfigError: an input matches nothing, or a file is in the folder ``output``, where it could be overwritten.
    """
    found: dict[str, str] = {}
    for given in inputs:
        # A file whose name holds brackets or a star is that file, not a pattern.
        paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
        files = [file for path in paths for file in (_walk(path, output) if os.path.isdir(path) else [path])]
        if not files:
            raise ConfigError(f"--input {given} is invalid: it matches no {'image' if paths else 'file'}.")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    for real, file in found.items():
        if os.path.dirname(real) == os.path.realpath(output):
            raise ConfigError(
                f"--output {output} is invalid: a drawing could overwrite the input {file}. Fix: use another folder."
            )
    return list(found.values())


def draw_images(
    predictor: Predictor, files: Sequence[str], output: str, *, threshold: float, absolute_paths: bool = False
) -> int:
    """Draw the predictions for each file into the folder ``output``, and save them in :data:`DETECTIONS_FILE`.

    Images that cannot be read are reported and skipped. The predictions so far are saved whatever happens. In the JSON,
    ``file_name`` is relative to ``info.root``, the folder that contains all files.

    Args:
        predictor: a :class:`~halodet.inference.Predictor`.
        files: paths of the images.
        output: an existing folder.
        threshold: minimum score.
        absolute_paths: write absolute paths as ``file_name``.

    Returns:
        Exit code: 0, 1 if an image failed or cannot be written, 130 after Ctrl-C, or that of another expected error.
    """
    categories = [{"id": entry["id"], "name": entry["name"]} for entry in predictor.classes]
    root = "" if absolute_paths else _common_folder(files)
    coco: dict[str, Any] = {"info": {"root": root}, "images": [], "annotations": [], "categories": categories}
    used = {DETECTIONS_FILE}
    failed, code = 0, 0
    try:
        for file in tqdm(files, unit="image", disable=len(files) < 2):
            try:
                _draw_image(predictor, file, output, threshold, coco, used)
            except ImageError as error:
                failed += 1
                _print(str(error))
    except KeyboardInterrupt:
        code = 130
        _print("Stopped by Ctrl-C")
    except HalodetError as error:
        code = error.exit_code
        _print(str(error))
    except OSError as error:
        code = 1
        _print(f"--output {output} cannot be written to ({error.strerror or error}). Fix: use another folder.")
    finally:
        try:
            write_json(os.path.join(output, DETECTIONS_FILE), coco)
        except OSError as error:
            code = code or 1
            _print(f"{os.path.join(output, DETECTIONS_FILE)} cannot be written ({error.strerror or error}).")
    drawn = len(coco["images"])
    rest = len(files) - drawn - failed
    print(f"{drawn} drawn, {failed} failed{f', {rest} not processed' if rest else ''}: {output}")
    return code or int(failed > 0)


def _draw_image(
    predictor: Predictor,
    file: str,
    output: str,
    threshold: float,
    coco: dict[str, Any],
    used: set[str],
) -> None:
    image = read_image(file)
    prediction = predictor.predict(image)
    names = [entry["name"] for entry in predictor.classes]
    drawing = draw_output(image, prediction, names, predictor.stuff_classes, threshold=threshold)
    name = _unused_name(os.path.basename(file), used)
    Image.fromarray(drawing[:, :, ::-1]).save(os.path.join(output, name), quality=95)
    image_id, first_id = len(coco["images"]) + 1, len(coco["annotations"]) + 1
    results = []
    if "instances" in prediction:
        kept = prediction["instances"][prediction["instances"].scores >= threshold]
        results = to_coco(kept, image_id, [entry["id"] for entry in predictor.classes])
    # Recorded last, so that the JSON never names a drawing that does not exist.
    used.add(name.casefold())
    height, width = image.shape[:2]
    root, path = coco["info"]["root"], os.path.abspath(file)
    path = os.path.relpath(path, root).replace(os.sep, "/") if root else path
    coco["images"].append({"id": image_id, "file_name": path, "width": width, "height": height, "drawing": name})
    for number, result in enumerate(results, first_id):
        mask = result.get("segmentation")
        area = float(mask_util.area(mask)) if mask else result["bbox"][2] * result["bbox"][3]
        coco["annotations"].append({"id": number, **result, "area": area, "iscrowd": 0})


def _common_folder(files: Sequence[str]) -> str:
    try:
        return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    except ValueError:  # on different drives of Windows
        return ""


def _unused_name(name: str, used: set[str]) -> str:
    """Return the name of a drawing: the image's, with .png appended unless it is JPEG or PNG, numbered if taken."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in (".jpg", ".jpeg", ".png"):
        stem, suffix = name, ".png"
    candidate, number = stem + suffix, 2
    while candidate.casefold() in used:  # some file systems ignore case
        candidate, number = f"{stem}_{number}{suffix}", number + 1
    return candidate


def _walk(folder: str, output: str) -> Iterator[str]:
    output = os.path.realpath(output)
    for root, folders, names in os.walk(folder):
        # The drawings of an earlier run are not inputs.
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(root, f)) != output
        )
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() not in NOT_IMAGES:
                yield os.path.join(root, name)


def _print(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
