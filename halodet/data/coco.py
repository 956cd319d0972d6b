"""Checks a user's COCO json before Detectron2 and pycocotools see it: they stop, or crash, on many faults without naming the entry."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from halodet.data.masks import clean_mask, mask_area
from halodet.data.values import TOLERANCE, InvalidAnnotation, Note, is_int, is_number, show
from halodet.errors import DatasetError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from tqdm import tqdm

_EXIF_ORIENTATION, _EXIF_TURNED = 0x0112, (5, 6, 7, 8)
LEFT_OUT = (
    "left out in training"  # what is done with an image that is in the json's cleaned form, and cannot be learned from
)
_PROGRESS_FROM = 1000  # images


@dataclass(frozen=True)
class Fault:
    """One fault of a dataset and what was done about it; `str()` gives it on one line."""

    file: str
    where: str
    what: str
    action: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.what}; {self.action}"


@dataclass(frozen=True)
class ValidatedCoco:
    """The usable part of a COCO json and the faults found in the rest.

    Attributes:
        json_file: the file that was read.
        dataset: COCO dict of `images`, `annotations` and `categories` (sorted by id), boxes as x, y, width, height in pixels.
        faults: in the order of the file's entries; empty for a clean file.
    """

    json_file: Path
    dataset: dict[str, Any]
    faults: list[Fault]

    @property
    def class_names(self) -> list[str]:
        """Names of the categories in the order in which Detectron2 numbers them (by id)."""
        return [category["name"] for category in self.dataset["categories"]]

    def fault_lines(self, limit: int = 200) -> list[str]:
        """The faults, one line each; of more than ``limit`` only the first, and how many more there are."""
        lines = [str(fault) for fault in self.faults[:limit]]
        return lines if len(self.faults) <= limit else [*lines, f"... and {len(self.faults) - limit} more faults"]

    def save(self, path: str | Path) -> None:
        """Write the cleaned dataset as strict JSON, whole or not at all.

        Raises:
            DatasetError: `path` is the file that was read, or cannot be written.
        """
        path = Path(path)
        if path.resolve() == self.json_file.resolve():
            raise DatasetError(
                f"{path} is the file that was checked and is never overwritten; save the cleaned json under another name"
            )
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.dataset, sort_keys=True, allow_nan=False), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            reason = error.strerror or error
            raise DatasetError(
                f"cannot write the cleaned json {path} ({reason}); give a path that can be written"
            ) from error


def _where(kind: str, entry: Any, index: int) -> str:
    return f"{kind} {show(entry['id'])}" if isinstance(entry, dict) and "id" in entry else f"{kind} at index {index}"


def _read(json_file: Path) -> dict[str, Any]:
    try:
        content = json_file.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{json_file} does not exist; give the path of a COCO annotation file") from None
    except IsADirectoryError:
        raise DatasetError(f"{json_file} is a folder; give the path of a COCO annotation file") from None
    except OSError as error:
        raise DatasetError(f"{json_file} cannot be read ({error.strerror or error}); check its permissions") from error
    if not content.strip():
        raise DatasetError(f"{json_file} is empty ({len(content)} bytes); export or copy it again")
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{json_file} is not UTF-8 text (byte {error.start} of {len(content)}); save it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno} of {len(content)} bytes"
        raise DatasetError(
            f"{json_file} is not valid JSON or is cut short ({error.msg} at {at}); export or copy it again"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists nested thousands deep
        raise DatasetError(f"{json_file} cannot be parsed ({error}); export it again") from None
    if not isinstance(data, dict):
        raise DatasetError(
            f"{json_file} holds {show(data)} where a COCO json has an object with 'images', 'annotations' and 'categories'"
        )
    return data


def _list(data: dict[str, Any], key: str, json_file: Path, required: bool) -> list[Any]:
    value = data.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list) or (required and not value):
        found = f"is {show(value)}" if key in data else "is missing"
        raise DatasetError(f"{json_file}: the '{key}' list {found}; export the file again as COCO instances json")
    return value


def _require_ints(entry: Any, *keys: str) -> None:
    if not isinstance(entry, dict):
        raise InvalidAnnotation(f"is {show(entry)} and not an object")
    for key in keys:
        if key not in entry:
            raise InvalidAnnotation(f"has no {key!r}")
        if not is_int(entry[key]):
            raise InvalidAnnotation(f"{key!r} is {show(entry[key])} and not an integer")


def _clean_category(entry: Any, seen: dict[int, Any]) -> dict[str, Any]:
    _require_ints(entry, "id")
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        raise InvalidAnnotation(f"'name' is {show(entry.get('name'))} and not a text")
    if entry["id"] in seen:
        raise InvalidAnnotation(f"{entry['name']!r} has the id of an earlier category, {seen[entry['id']]['name']!r}")
    return {key: entry[key] for key in ("id", "name", "supercategory") if isinstance(entry.get(key), (int, str))}


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height as Detectron2 will see them: from the header alone, turned as the EXIF orientation says."""
    with Image.open(path) as image:
        width, height = image.size
        try:
            # The base class's reader, as PNG's own one decodes the whole picture in search of late metadata.
            turned = Image.Image.getexif(image).get(_EXIF_ORIENTATION) in _EXIF_TURNED
        except Exception:  # Detectron2 likewise takes an image with broken EXIF as it is
            turned = False
    return (height, width) if turned else (width, height)


def _clean_image(entry: Any, image_dir: Path, seen: dict[int, Any]) -> dict[str, Any]:
    _require_ints(entry, "id", "width", "height")
    file_name, width, height = entry.get("file_name"), entry["width"], entry["height"]
    if not isinstance(file_name, str) or not file_name:
        raise InvalidAnnotation(f"'file_name' is {show(file_name)} and not a text")
    if width <= 0 or height <= 0:
        raise InvalidAnnotation(f"its size is {width} x {height}, not positive")
    if entry["id"] in seen:
        raise InvalidAnnotation(
            f"{show(file_name)} has the id of an earlier image, {show(seen[entry['id']]['file_name'])}"
        )
    path = image_dir / file_name
    if not os.path.isfile(path):
        raise InvalidAnnotation(f"{show(file_name)} is not in {image_dir}")
    try:
        real = _image_size(path)
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split()) if not isinstance(error, Image.UnidentifiedImageError) else "not an image"
        raise InvalidAnnotation(
            f"{show(file_name)} cannot be opened as an image ({reason or type(error).__name__})"
        ) from None
    if real != (width, height):
        raise InvalidAnnotation(
            f"its size is given as {width} x {height}, but {show(file_name)} is {real[0]} x {real[1]}"
        )
    return {"id": entry["id"], "file_name": file_name, "width": width, "height": height}


def _clean_box(box: Any, width: int, height: int, note: Note) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise InvalidAnnotation(f"'bbox' is {show(box)} and not four finite numbers")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise InvalidAnnotation(f"'bbox' {box} has width {w} and height {h}")
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        raise InvalidAnnotation(f"'bbox' {box} lies outside the image of {width} x {height}")
    if max(left - x, top - y, x + w - right, y + h - bottom) <= TOLERANCE:
        return box
    note(f"'bbox' {box} reaches out of the image of {width} x {height}", "clipped")
    return [left, top, right - left, bottom - top]


class _Checker:
    """Goes through one file's lists, keeping what is usable and reporting the rest."""

    def __init__(self, json_file: Path) -> None:
        self.file = json_file.name
        self.faults: list[Fault] = []
        self.missing: dict[str, list[str]] = {"area": [], "iscrowd": []}

    def report(self, where: str, what: str, action: str) -> None:
        self.faults.append(Fault(self.file, where, what, action))

    def categories(self, entries: list[Any]) -> dict[int, dict[str, Any]]:
        clean: dict[int, dict[str, Any]] = {}
        for index, entry in enumerate(entries):
            try:
                clean[entry["id"]] = _clean_category(
                    entry, clean
                )  # the right side runs first and refuses what has no usable id
            except InvalidAnnotation as error:
                self.report(_where("category", entry, index), str(error), "skipped")
        for name, count in Counter(category["name"] for category in clean.values()).items():
            if count > 1:
                self.report("categories", f"{count} are named {show(name)}", "kept as separate classes")
        return clean

    def images(
        self, entries: list[Any], image_dir: Path, annotations: list[Any]
    ) -> tuple[dict[int, dict[str, Any]], set[int]]:
        """The usable images by id, and the ids of the skipped ones."""
        clean: dict[int, dict[str, Any]] = {}
        used = Counter(
            entry["image_id"] for entry in annotations if isinstance(entry, dict) and is_int(entry.get("image_id"))
        )
        bad: list[tuple[str, str, int | None]] = []
        quiet = len(entries) <= _PROGRESS_FROM
        for index, entry in enumerate(
            tqdm(entries, desc=f"checking images of {self.file}", unit="image", disable=quiet)
        ):
            try:
                clean[entry["id"]] = _clean_image(entry, image_dir, clean)
            except InvalidAnnotation as error:
                known = isinstance(entry, dict) and is_int(entry.get("id"))
                bad.append((_where("image", entry, index), str(error), entry["id"] if known else None))
        for where, what, image_id in bad:  # after the loop, as a later entry of the same id may be usable
            count = used[image_id] if image_id is not None and image_id not in clean else 0
            self.report(where, what, f"skipped with its {count} annotations" if count else "skipped")
        return clean, {image_id for _, _, image_id in bad if image_id is not None and image_id not in clean}

    def annotation(self, entry: dict[str, Any], where: str, image: dict[str, Any], need_masks: bool) -> dict[str, Any]:
        note = partial(self.report, where)
        width, height = image["width"], image["height"]
        iscrowd, mask, area = entry.get("iscrowd"), entry.get("segmentation"), entry.get("area")
        if iscrowd not in (None, 0, 1):
            raise InvalidAnnotation(f"'iscrowd' is {show(iscrowd)} and neither 0 nor 1")
        box = _clean_box(entry.get("bbox"), width, height, note)
        clean = {"id": entry.get("id"), "image_id": image["id"], "category_id": entry["category_id"], "bbox": box}
        if need_masks or mask is not None:
            try:
                clean["segmentation"] = clean_mask(mask, width, height, note)
            except InvalidAnnotation as error:
                if need_masks:
                    raise
                note(str(error), "mask dropped, box kept")
        if not is_number(area) or area < 0:
            if area is None:
                self.missing["area"].append(where)
            else:
                note(f"'area' is {show(area)}", "computed from the mask or box")
            area = mask_area(clean["segmentation"], width, height) if "segmentation" in clean else box[2] * box[3]
        if iscrowd is None:
            self.missing["iscrowd"].append(where)
        if entry.get("ignore"):  # Detectron2 refuses the key; a crowd is likewise neither learned from nor counted
            iscrowd = 1
            note(f"'ignore' is {show(entry['ignore'])}, which Detectron2 does not know", "kept as a crowd (iscrowd 1)")
        return {**clean, "area": area, "iscrowd": int(iscrowd or 0)}

    def annotations(
        self,
        entries: list[Any],
        images: dict[int, dict[str, Any]],
        skipped: set[int],
        categories: dict[int, Any],
        need_masks: bool,
    ) -> list[dict[str, Any]]:
        clean: list[dict[str, Any]] = []
        for index, entry in enumerate(entries):
            where = _where("annotation", entry, index)
            try:
                _require_ints(entry, "image_id", "category_id")
                if entry["image_id"] in skipped:
                    continue  # reported with its image
                if entry["image_id"] not in images:
                    raise InvalidAnnotation(f"'image_id' {entry['image_id']} is not among the images")
                if entry["category_id"] not in categories:
                    raise InvalidAnnotation(f"'category_id' {entry['category_id']} is not among the categories")
                clean.append(self.annotation(entry, where, images[entry["image_id"]], need_masks))
            except InvalidAnnotation as error:
                self.report(where, str(error), "skipped")
        for (
            key,
            places,
        ) in self.missing.items():  # one line each: exporters leave a key out of all annotations or of none
            if places:
                action = "computed from the mask or box" if key == "area" else "taken as 0"
                self.report(
                    "annotations", f"{len(places)} of {len(entries)} have no '{key}', the first is {places[0]}", action
                )
        self.number(clean)
        if clean and all(annotation["iscrowd"] for annotation in clean):
            self.report(
                "annotations", f"all {len(clean)} usable ones are crowds, so nothing can be learned from them", "kept"
            )
        if not clean:
            self.report(
                "annotations",
                f"{len(entries)} given, none usable, so nothing can be learned from this file",
                "images kept",
            )
        return clean

    def spoiled(self, entries: list[Any], images: dict[int, dict[str, Any]], clean: list[dict[str, Any]]) -> set[int]:
        """The images all of whose annotations, crowds aside, turned out to be unusable: training leaves such an image out."""
        learned = {annotation["image_id"] for annotation in clean if not annotation["iscrowd"]}
        given = Counter(
            entry["image_id"]
            for entry in entries
            if isinstance(entry, dict)
            and is_int(entry.get("image_id"))
            and not entry.get("iscrowd")
            and not entry.get("ignore")
        )
        spoiled = {image_id for image_id in images if given[image_id] and image_id not in learned}
        for image_id in sorted(spoiled):
            self.report(f"image {image_id}", f"none of its {given[image_id]} annotations can be used", LEFT_OUT)
        return spoiled

    def number(self, annotations: list[dict[str, Any]]) -> None:
        """Give a new id to every annotation whose own is missing, taken, or 0, which pycocotools reads as 'not matched'."""
        taken: set[int] = set()
        renumber = []
        for annotation in annotations:
            if is_int(annotation["id"]) and annotation["id"] != 0 and annotation["id"] not in taken:
                taken.add(annotation["id"])
            else:
                renumber.append(annotation)
        for new, annotation in enumerate(renumber, start=max(taken | {0}) + 1):
            old = annotation["id"]
            what = "has an id that was used before"
            if not is_int(old) or old == 0:
                what = "has an id that pycocotools cannot match" if old == 0 else "has no usable 'id'"
            self.report(f"annotation {show(old)} of image {annotation['image_id']}", what, f"kept as annotation {new}")
            annotation["id"] = new


def validate_coco(
    json_file: str | Path, image_dir: str | Path, *, need_masks: bool = True, require_annotations: bool = False
) -> ValidatedCoco:
    """Read a COCO json, keep what Detectron2 can use, and list every fault of the rest.

    Nothing is written. An image is opened no further than its header, so a file that breaks off later is not noticed.

    Args:
        json_file: COCO instances annotations.
        image_dir: the folder that the json's file names are relative to.
        need_masks: skip annotations without a usable mask; otherwise only their mask is dropped.
        require_annotations: the file is to be trained on: refuse one without a single annotation to learn from (crowds are not learned
            from), and leave out images none of whose annotations can be used.

    Raises:
        DatasetError: the file is unreadable, is not COCO json, or has no usable image or category.
    """
    json_file, image_dir = Path(json_file), Path(image_dir)
    data = _read(json_file)
    image_entries, category_entries = (_list(data, key, json_file, required=True) for key in ("images", "categories"))
    annotation_entries = _list(data, "annotations", json_file, required=False)
    if not image_dir.is_dir():
        raise DatasetError(f"{image_dir} is not a folder; give the folder that holds the images of {json_file}")

    checker = _Checker(json_file)
    categories = checker.categories(category_entries)
    if not categories:
        raise DatasetError(
            f"{json_file}: no usable category among {len(category_entries)} ({checker.faults[0]}); correct the list"
        )
    found = len(checker.faults)
    images, skipped = checker.images(image_entries, image_dir, annotation_entries)
    if not images:
        first = checker.faults[found]
        raise DatasetError(
            f"{json_file}: no usable image among {len(image_entries)}, looked for in {image_dir} (first {first.where}: {first.what}); "
            "give the folder that the file names are relative to"
        )
    found = len(checker.faults)
    annotations = checker.annotations(annotation_entries, images, skipped, categories, need_masks)
    if require_annotations and all(annotation["iscrowd"] for annotation in annotations):
        first = checker.faults[found] if len(checker.faults) > found else checker.faults[0]
        raise DatasetError(
            f"{json_file}: no annotation to learn from among {len(annotation_entries)} (first fault, {first.where}: {first.what}); "
            "training needs at least one usable annotation that is not a crowd"
        )

    spoiled = checker.spoiled(annotation_entries, images, annotations)
    if require_annotations:
        # Without them its objects would be learned as background.
        images = {image_id: image for image_id, image in images.items() if image_id not in spoiled}
        annotations = [annotation for annotation in annotations if annotation["image_id"] not in spoiled]

    dataset: dict[str, Any] = {
        "info": {},  # some versions of pycocotools stop without it
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [categories[key] for key in sorted(categories)],
    }
    for key in ("info", "licenses"):
        if key in data:
            try:
                json.dumps(data[key], allow_nan=False)
                dataset[key] = data[key]
            except ValueError:
                checker.report(key, "holds NaN or infinity, which is not JSON", "dropped")
    return ValidatedCoco(json_file, dataset, checker.faults)


def check_same_categories(train: ValidatedCoco, val: ValidatedCoco) -> None:
    """Make sure that two datasets number the same classes alike; their category ids themselves may differ.

    Raises:
        DatasetError: the class names in the order of their ids differ.
    """
    first, second = train.class_names, val.class_names
    where = f"{train.json_file} and {val.json_file} must have the same categories in the same order of ids"
    for number, (a, b) in enumerate(zip(first, second, strict=False), start=1):
        if a != b:
            raise DatasetError(
                f"{where}, but category {number} is {show(a)} in the first and {show(b)} in the second; make them agree"
            )
    if len(first) != len(second):
        extra = max(first, second, key=len)[min(len(first), len(second))]
        raise DatasetError(
            f"{where}, but the first has {len(first)} and the second {len(second)} (with {show(extra)}); make them agree"
        )


def register_checked(name: str, checked: ValidatedCoco, image_dir: str | Path, save_to: str | Path) -> None:
    """Save a checked dataset and register it with Detectron2, class names included.

    The same name may be registered again with the same `save_to`; the later dataset then takes the place of the earlier one.

    Args:
        name: the name for `cfg.DATASETS`.
        checked: what `validate_coco` returned.
        image_dir: the folder that was given to `validate_coco`.
        save_to: path of the cleaned json.

    Raises:
        DatasetError: the name belongs to another dataset, or the json cannot be written.
    """
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("json_file") != str(save_to):
            raise DatasetError(
                f"dataset name {name!r} is taken by another dataset; choose another name for {checked.json_file}"
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    checked.save(save_to)
    register_coco_instances(name, {}, str(save_to), str(image_dir))
    MetadataCatalog.get(name).set(thing_classes=checked.class_names)  # known before the file is loaded
