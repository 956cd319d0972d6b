"""Reading of YOLO and Pascal VOC datasets as COCO json.

Coordinates are kept as they are written. supervision, which converts both formats too, draws polygons into masks of
whole pixels (IoU of 0.76 with the polygon at a radius of 4 pixels), keeps all masks in memory, and drops objects whose
image is missing or in a subfolder.
"""

from __future__ import annotations

import glob
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from halodet.data.annotation_formats import recognize
from halodet.data.annotations import is_int, show
from halodet.data.image_files import read_image_size
from halodet.errors import DatasetError

import yaml

logger = logging.getLogger(__name__)

_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation")}
_YAML = (".yaml", ".yml")
_MIN_PARTS = 2  # of a path whose leading folders are missing: "images" alone may be those of another split
_TRIED = 5  # files of a folder whose format is looked at


def is_yolo_or_voc(path: str | Path) -> bool:
    """Return whether ``path`` is a yaml file or a folder, which :func:`read_yolo_or_voc` reads."""
    return Path(path).suffix.lower() in _YAML or Path(path).is_dir()


def read_yolo_or_voc(path: Path, image_dir: Path | None, split: str) -> tuple[dict[str, Any], Path]:
    """Read a YOLO data.yaml, or a folder of Pascal VOC xml files or with one data.yaml, as a COCO dict.

    Args:
        path: yaml file or folder.
        image_dir: folder of the images; None for the images of a data.yaml's split, or those beside the xml files.
        split: ``"train"`` or ``"val"``.

    Returns:
        COCO dict for the validation, whose entries may be invalid, and the folder that its file names are relative to.

    Raises:
        DatasetError: the files cannot be read or have another format.
    """
    if path.suffix.lower() in _YAML:
        return _read_yolo(path, image_dir, split)
    if voc := _read_voc(path, image_dir, split):
        return voc
    yaml_files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in _YAML]
    if len(yaml_files) == 1:
        return _read_yolo(yaml_files[0], image_dir, split)
    files = _files(path, (".json", ".xml", ".txt", ".csv"))
    for file in files[:_TRIED]:
        if found := recognize(file):
            raise DatasetError(f"{path} is a folder; {file.relative_to(path)} in it {found}")
    example = f", such as {files[0]}" if files and files[0].suffix.lower() == ".json" else ""
    raise DatasetError(f"{path} is a folder without VOC xml files and data.yaml. Fix: give a COCO json{example}.")


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files in ``folder`` and below with one of ``suffixes``, sorted; hidden ones are left out."""
    pattern = os.path.join(glob.escape(str(folder)), "**", "*")
    return [Path(name) for name in sorted(glob.iglob(pattern, recursive=True)) if name.lower().endswith(suffixes)]


def _size(image: Path) -> tuple[int, int]:
    """Return the size after EXIF rotation, or 1 x 1 for a file that the validation reports as unusable."""
    try:
        return read_image_size(image)[:2]
    except Exception:  # Pillow's decoders raise nearly anything on a broken file
        return 1, 1


def _coco(images: list[Any], annotations: list[Any], names: dict[int, str]) -> dict[str, Any]:
    for number, annotation in enumerate(annotations, start=1):
        annotation |= {"id": number, "iscrowd": annotation.get("iscrowd", 0)}
    categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
    return {"images": images, "annotations": annotations, "categories": categories}


# --- YOLO


def _read_yolo(file: Path, image_dir: Path | None, split: str) -> tuple[dict[str, Any], Path]:
    """Read one split of a data.yaml; category ids are YOLO's class indices.

    Images without a label file have no objects. Polygons, and the corners of oriented boxes, become masks. Of
    keypoints, only the box is read.
    """
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"{file} cannot be read ({error.strerror or error}).") from error
    except (ValueError, yaml.YAMLError) as error:
        raise DatasetError(f"{file} is not valid YAML ({' '.join(str(error).split())}).") from error
    names = _class_names(file, config)
    if image_dir is None:
        images = _split_images(file, config, split)
        folders = {image.parent for image in images}
        image_dir = Path(os.path.commonpath(folders)) if folders else file.parent
    else:
        images = _files(Path(os.path.abspath(image_dir)), _IMAGES)
    if not images:
        raise DatasetError(
            f"{file} is a YOLO dataset, but split {split!r} has no image in {image_dir}. Fix: give its image folder."
        )
    labels = [_label_file(image) for image in images]
    if not any(labels):
        raise DatasetError(
            f"{file} is a YOLO dataset, but none of {len(images)} images in {image_dir} has a label file (expected "
            f"{_label_candidates(images[0])[0]} for {images[0].name}). Fix: give the image folder that is beside a "
            "folder labels."
        )
    keypoints = config.get("kpt_shape")
    extra = math.prod(keypoints) if isinstance(keypoints, list) and all(map(is_int, keypoints)) else 0
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
        width, height = _size(image)
        name = Path(os.path.relpath(image, image_dir)).as_posix()
        entries.append({"id": number, "file_name": name, "width": width, "height": height})
        for where, values in _label_lines(label):
            annotations.append({"image_id": number, "_source": where, **_yolo_object(values, width, height, extra)})
    return _coco(entries, annotations, names), image_dir


def _class_names(file: Path, config: Any) -> dict[int, str]:
    given = config.get("names") if isinstance(config, dict) else None
    names = dict(enumerate(given)) if isinstance(given, list) else given
    if not isinstance(names, dict) or not names or not all(str(key).isdecimal() for key in names):
        found = f"names={show(given)} is invalid" if given is not None else "'names' is missing"
        raise DatasetError(f"{file}: {found}: expected the class names of a YOLO dataset, as a list or by index.")
    return {int(key): str(name) for key, name in names.items()}


def _split_images(file: Path, config: dict[str, Any], split: str) -> list[Path]:
    """Return the images of a split: a folder, a txt file of image paths, or a list of these.

    Paths are relative to the yaml's ``path``, which is relative to the yaml or to the working directory. An exported
    yaml often has paths of another machine or is one folder too high, so leading folders may be missing.
    """
    key = next((key for key in _SPLITS[split] if config.get(key)), None)
    if key is None:
        raise DatasetError(f"{file}: {split!r} is missing: expected the folder of its images.")
    parts = config[key] if isinstance(config[key], list) else [config[key]]
    base = str(config.get("path") or "")
    roots = [file.parent / base, Path(base), file.parent]
    images: list[Path] = []
    for part in parts:
        found = _find_path(str(part), roots)
        if found is None:
            raise DatasetError(f"{file}: {key}={show(part)} is not in {file.parent.resolve()}. Fix: correct the path.")
        if not found.is_dir() and found.suffix.lower() != ".txt":
            raise DatasetError(
                f"{file}: {key}={show(part)} is invalid: expected a folder or a txt file of image paths."
            )
        if found.is_dir():
            images += _files(found, _IMAGES)
        else:
            lines = found.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            images += [_find_path(name, [found.parent, *roots]) or found.parent / name for name in names]
    return list(dict.fromkeys(images))


def _find_path(name: str, roots: Iterable[Path]) -> Path | None:
    """Return the absolute path of ``name`` below one of ``roots``, or else of the end of it."""
    parts = Path(name.replace("\\", "/")).parts
    for start in range(len(parts) or 1):
        if start > len(parts) - _MIN_PARTS and any(part != ".." for part in parts[:start]):
            break
        for root in roots:
            path = Path(os.path.abspath(root.joinpath(*parts[start:])))
            if os.path.exists(path):
                return path
    return None


def _label_candidates(image: Path) -> list[Path]:
    """Return where the label file of an image may be: the last folder "images" replaced by "labels", or beside it."""
    parts = list(image.with_suffix(".txt").parts)
    beside = Path(*parts)
    if "images" not in parts[:-1]:
        return [beside]
    parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return [Path(*parts), beside]


def _label_file(image: Path) -> Path | None:
    return next((path for path in _label_candidates(image) if path.is_file()), None)


def _label_lines(file: Path | None) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the words of each line of a label file."""
    if file:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
            if line.strip():
                yield f"{file.name} line {number}", line.split()


def _yolo_object(values: list[str], width: int, height: int, extra: int) -> dict[str, Any]:
    """Return the category, box, mask and area of one line; what cannot be parsed is left to the validation.

    A line of 5 values is a box, one of more is a polygon. A confidence may follow.

    Args:
        values: the words of the line.
        width: width of the image.
        height: height of the image.
        extra: number of values of the keypoints that follow a box.
    """
    index, *numbers = map(_number, values)
    category = int(index) if isinstance(index, float) and index.is_integer() else values[0]
    if not all(isinstance(number, float) for number in numbers):
        return {"category_id": category, "bbox": numbers}
    if len(numbers) in (4, 5) or (extra and len(numbers) == 4 + extra):
        x, y, w, h = (number * size for number, size in zip(numbers[:4], (width, height) * 2, strict=True))
        return {"category_id": category, "bbox": [x - w / 2, y - h / 2, w, h], "area": w * h}
    if len(numbers) < 6:
        return {"category_id": category, "bbox": numbers}
    pairs = zip(numbers[::2], numbers[1::2])  # noqa: B905  # a confidence is left out
    return {"category_id": category, **_polygon([(x * width, y * height) for x, y in pairs])}


def _number(text: str) -> Any:
    """Return a float, or ``text`` itself for the message of the validation."""
    try:
        return float(text)
    except ValueError:
        return text


def _polygon(points: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the box, mask and area of a polygon."""
    xs, ys = zip(*points, strict=True)
    following = [*points[1:], points[0]]
    area = abs(sum(x * v - u * y for (x, y), (u, v) in zip(points, following, strict=True))) / 2
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return {"bbox": box, "segmentation": [[value for point in points for value in point]], "area": area}


# --- Pascal VOC


def _parse_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(file.read_bytes())
    except OSError as error:
        raise DatasetError(f"{file} cannot be read ({error.strerror or error}).") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DatasetError(f"{file} is not valid xml ({error}). Fix: correct or delete it.") from error


def _read_voc(folder: Path, image_dir: Path | None, split: str) -> tuple[dict[str, Any], Path] | None:
    """Read the Pascal VOC files of a folder; the classes are sorted by name, and category ids start at 1.

    Images without an xml file are left out. If ``ImageSets/Main`` in or beside the folder has a list of the split, only
    its images are read. As in Detectron2, coordinates start at 1, and objects marked as difficult
    are trained on; in an evaluation they are ignored.

    Returns:
        None if there is no such file.
    """
    if image_dir is None:
        beside = folder.parent / "JPEGImages"
        image_dir = beside if beside.is_dir() else folder
    listed = _listed(folder, split)
    by_stem: dict[str, list[Path]] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file in _files(folder, (".xml",)):
        if listed is not None and file.stem not in listed:
            continue
        root = _parse_xml(file)
        if root.tag != "annotation":
            continue
        if not images:
            for image in _files(image_dir, _IMAGES):
                by_stem.setdefault(image.stem, []).append(image.relative_to(image_dir))
        number = len(images) + 1
        name = _voc_image(file.relative_to(folder), _text(root, "filename"), by_stem)
        sizes = [_number(_text(root, f"size/{key}")) for key in ("width", "height")]
        known = all(isinstance(size, float) and size > 0 and size.is_integer() for size in sizes)
        width, height = map(int, sizes) if known else _size(image_dir / name)
        images.append({"id": number, "file_name": name.as_posix(), "width": width, "height": height})
        for index, entry in enumerate(root.iterfind("object"), start=1):
            where = {"image_id": number, "_source": f"{file.name} object {index}"}
            ignored = split == "val" and _text(entry, "difficult") == "1"
            annotations.append(
                {**where, "category_id": _text(entry, "name"), "iscrowd": int(ignored), **_voc_object(entry)}
            )
    if not images and listed is not None:
        raise DatasetError(f"{folder}: ImageSets/Main/{split}.txt lists none of its xml files.")
    if not images:
        return None
    names = sorted({annotation["category_id"] for annotation in annotations} - {""})
    if not names:
        raise DatasetError(f"{folder}: none of {len(images)} xml files has an object with a name.")
    ids = {name: number for number, name in enumerate(names, start=1)}
    for annotation in annotations:
        annotation["category_id"] = ids.get(annotation["category_id"])
    return _coco(images, annotations, dict(enumerate(names, start=1))), image_dir


def _listed(folder: Path, split: str) -> set[str] | None:
    """Return the names in ``ImageSets/Main/<split>.txt``, None if there is no such file."""
    for root in (folder, folder.parent):
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            logger.info("Reading the images that %s lists", path)
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return {line.split()[0] for line in lines if line.strip()}
    return None


def _voc_image(file: Path, filename: str, by_stem: dict[str, list[Path]]) -> Path:
    """Return the image of an xml file: the one with its name, or else with the ``filename`` in it.

    Args:
        file: the xml file, relative to the folder of xml files.
        filename: the name in the xml file, which may be a path of another machine or have no suffix.
        by_stem: images by their name without suffix.
    """
    filename = re.split(r"[\\/]", filename)[-1]
    for stem in (file.stem, Path(filename).stem, filename):
        if found := by_stem.get(stem):
            rank = {image: (image.name == filename, _shared_folders(image, file)) for image in found}
            best = [image for image in found if rank[image] == max(rank.values())]
            return best[0] if len(best) == 1 else Path(f"{stem} (one of {', '.join(map(str, best[:3]))})")
    return Path(filename or f"{file.stem}.jpg")


def _shared_folders(image: Path, file: Path) -> int:
    """Return the number of folders that both paths start with; more if the image is in the folder of the file."""
    same = 0
    for a, b in zip(image.parent.parts, file.parent.parts, strict=False):
        if a != b:
            break
        same += 1
    return same + (image.parent == file.parent)


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _voc_object(entry: ElementTree.Element) -> dict[str, Any]:
    """Return the box, mask and area of an object; a box includes the pixels of its maximum."""
    numbers = [_number(_text(entry, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    polygon = [_number((element.text or "").strip()) for element in entry.findall("polygon/*")]
    valid = len(polygon) >= 6 and len(polygon) % 2 == 0 and all(isinstance(number, float) for number in polygon)
    found = _polygon([(x - 1, y - 1) for x, y in zip(polygon[::2], polygon[1::2], strict=True)]) if valid else {}
    if entry.find("bndbox") is None:
        return found
    if not all(isinstance(number, float) for number in numbers):
        return {"bbox": numbers}
    (left, right), (top, bottom) = sorted(numbers[::2]), sorted(numbers[1::2])
    left, top = max(left - 1, 0.0), max(top - 1, 0.0)  # an exporter may count from 0
    return {"area": (right - left) * (bottom - top), **found, "bbox": [left, top, right - left, bottom - top]}
