"""Validation of a user's COCO json.

Detectron2 and pycocotools stop or crash on many mistakes without naming the entry. Here each invalid entry is skipped
and listed, and what is left is registered with Detectron2.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from halodet.data.annotations import (
    TOLERANCE,
    InvalidAnnotation,
    Note,
    check_box,
    clean_mask,
    is_int,
    is_number,
    mask_area,
    show,
)
from halodet.errors import DatasetError
from halodet.utils.io import write_json

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from tqdm import tqdm

SKIPPED_IN_TRAINING = "skipped in training"  # action for an image that is valid COCO but cannot be trained on
_EXIF_ORIENTATION, _EXIF_ROTATED = 0x0112, (5, 6, 7, 8)
_SHOW_PROGRESS = 1000  # images from which a progress bar is shown


@dataclass(frozen=True)
class Issue:
    """A problem of one entry of a dataset, and the action taken; ``str()`` gives one line."""

    file: str
    where: str
    reason: str
    action: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.reason}; {self.action}"


@dataclass(frozen=True)
class ValidatedCoco:
    """The valid part of a COCO json, and the issues of the rest.

    Attributes:
        json_file: the json that was read.
        dataset: COCO dict of ``images``, ``annotations`` and ``categories`` (sorted by id); boxes are (x, y, width,
            height) in pixels.
        issues: in the order of the json's entries; empty if all entries are valid.
    """

    json_file: Path
    dataset: dict[str, Any]
    issues: list[Issue]

    @property
    def class_names(self) -> list[str]:
        """Category names in the order of Detectron2's class indices (by id)."""
        return [category["name"] for category in self.dataset["categories"]]

    def issue_lines(self, limit: int = 200) -> list[str]:
        """Return one line per issue, at most ``limit`` of them, and the number of further issues."""
        lines = [str(issue) for issue in self.issues[:limit]]
        return lines if len(self.issues) <= limit else [*lines, f"... and {len(self.issues) - limit} more issues"]

    def save(self, path: str | Path) -> None:
        """Write the valid part as a COCO json.

        Raises:
            DatasetError: ``path`` is the json that was read, or cannot be written.
        """
        path = Path(path)
        if path.resolve() == self.json_file.resolve():
            raise DatasetError(f"{path} is the input file and is not overwritten. Fix: give another path.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.dataset)
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be written ({error.strerror or error}). Fix: give another path."
            ) from error


def validate_coco(
    json_file: str | Path, image_dir: str | Path, *, need_masks: bool = True, require_annotations: bool = False
) -> ValidatedCoco:
    """Read a COCO json, keep the entries that Detectron2 can use, and list the issues of the others.

    Nothing is written. Only image headers are read, so a truncated image is not found.

    Args:
        json_file: COCO instances annotations.
        image_dir: folder that the json's file names are relative to.
        need_masks: skip annotations without a valid mask; otherwise only their mask is dropped.
        require_annotations: the json is for training: require at least one annotation that is not a crowd, and drop
            images all of whose annotations are invalid.

    Raises:
        DatasetError: the file is unreadable, is not COCO json, or has no valid image or category.
    """
    json_file, image_dir = Path(json_file), Path(image_dir)
    data = _read(json_file)
    image_entries, category_entries = (_list(data, key, json_file, required=True) for key in ("images", "categories"))
    annotation_entries = _list(data, "annotations", json_file, required=False)
    if not image_dir.is_dir():
        raise DatasetError(f"{image_dir} is not a folder. Fix: give the folder with the images of {json_file}.")

    validator = _Validator(json_file)
    categories = validator.categories(category_entries)
    if not categories:
        raise DatasetError(f"{json_file}: none of {len(category_entries)} categories is valid ({validator.first()}).")
    first = len(validator.issues)
    images, skipped = validator.images(image_entries, image_dir, annotation_entries)
    if not images:
        raise DatasetError(
            f"{json_file}: none of its {len(image_entries)} images is valid in {image_dir} ({validator.first(first)}). "
            "Fix: give the folder that the file names are relative to."
        )
    first = len(validator.issues)
    annotations = validator.annotations(annotation_entries, images, skipped, categories, need_masks)
    if require_annotations and all(annotation["iscrowd"] for annotation in annotations):
        raise DatasetError(
            f"{json_file}: none of its {len(annotation_entries)} annotations can be trained on "
            f"({validator.first(first)}); at least one valid annotation that is not a crowd is needed."
        )
    without_valid = validator.images_without_valid(annotation_entries, images, annotations)
    if require_annotations:  # the objects of these images would be learned as background
        images = {image_id: image for image_id, image in images.items() if image_id not in without_valid}
        annotations = [annotation for annotation in annotations if annotation["image_id"] not in without_valid]

    dataset: dict[str, Any] = {
        "info": {},  # some versions of pycocotools need it
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [categories[key] for key in sorted(categories)],
    }
    for key in ("info", "licenses"):
        try:
            json.dumps(data.get(key), allow_nan=False)
            dataset |= {key: data[key]} if key in data else {}
        except ValueError:
            validator.report(key, "contains NaN or infinity, which are not JSON", "dropped")
    return ValidatedCoco(json_file, dataset, validator.issues)


def check_same_categories(train: ValidatedCoco, val: ValidatedCoco) -> None:
    """Check that two datasets have the same classes in the same order; category ids may differ.

    Raises:
        DatasetError: the class names, sorted by category id, differ.
    """
    first, second = train.class_names, val.class_names
    if first == second:
        return
    number = next(number for number, (a, b) in enumerate(zip_longest(first, second)) if a != b)
    a, b = (show(names[number]) if number < len(names) else "missing" for names in (first, second))
    raise DatasetError(
        f"{train.json_file} and {val.json_file} must have the same categories in the order of their ids, but category "
        f"{number + 1} is {a} in the first and {b} in the second."
    )


def register_validated(name: str, validated: ValidatedCoco, image_dir: str | Path, save_to: str | Path) -> None:
    """Save a validated dataset and register it with Detectron2.

    Registering the same ``name`` and ``save_to`` again replaces the earlier dataset.

    Args:
        name: name for ``cfg.DATASETS``.
        validated: result of :func:`validate_coco`.
        image_dir: folder that was given to :func:`validate_coco`.
        save_to: path of the cleaned json.

    Raises:
        DatasetError: another dataset has this name, or the json cannot be written.
    """
    if name in DatasetCatalog and MetadataCatalog.get(name).get("json_file") != str(save_to):
        raise DatasetError(f"dataset name {name!r} is taken. Fix: choose another name for {validated.json_file}.")
    validated.save(save_to)
    register_cleaned(name, image_dir, save_to)
    MetadataCatalog.get(name).set(thing_classes=validated.class_names)  # available before the file is loaded


def register_cleaned(name: str, image_dir: str | Path, json_file: str | Path) -> None:
    """Register the json that :meth:`ValidatedCoco.save` wrote; its annotations are not validated again."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {"validated": True}, str(json_file), str(image_dir))


class _Validator:
    """Validate the lists of one json: keep the valid entries and collect the issues of the others."""

    def __init__(self, json_file: Path) -> None:
        self.file = json_file.name
        self.issues: list[Issue] = []
        self.missing: dict[str, list[str]] = {"area": [], "iscrowd": []}

    def report(self, where: str, reason: str, action: str) -> None:
        self.issues.append(Issue(self.file, where, reason, action))

    def first(self, start: int = 0) -> str:
        """Return the first issue from index ``start`` on, or the first one of all."""
        issue = self.issues[start] if start < len(self.issues) else self.issues[0]
        return f"first issue: {issue.where}: {issue.reason}"

    def categories(self, entries: list[Any]) -> dict[int, dict[str, Any]]:
        """Return the valid categories by id."""
        valid: dict[int, dict[str, Any]] = {}
        for index, entry in enumerate(entries):
            try:
                category = _clean_category(entry, valid)
                valid[category["id"]] = category
            except InvalidAnnotation as error:
                self.report(_where("category", entry, index), str(error), "skipped")
        for name, count in Counter(category["name"] for category in valid.values()).items():
            if count > 1:
                self.report("categories", f"{count} have the name {show(name)}", "kept as separate classes")
        return valid

    def images(
        self, entries: list[Any], image_dir: Path, annotations: list[Any]
    ) -> tuple[dict[int, dict[str, Any]], set[int]]:
        """Return the valid images by id, and the ids of the skipped ones."""
        valid: dict[int, dict[str, Any]] = {}
        used = _count_by_image(annotations, lambda entry: True)
        skipped: list[tuple[str, str, int | None]] = []
        bar = partial(tqdm, desc=f"checking images of {self.file}", unit="image", disable=len(entries) < _SHOW_PROGRESS)
        for index, entry in enumerate(bar(entries)):
            try:
                image = _clean_image(entry, image_dir, valid)
                valid[image["id"]] = image
            except InvalidAnnotation as error:
                has_id = isinstance(entry, dict) and is_int(entry.get("id"))
                skipped.append((_where("image", entry, index), str(error), entry["id"] if has_id else None))
        for where, reason, image_id in skipped:  # after the loop, as a later entry of the same id may be valid
            count = used[image_id] if image_id is not None and image_id not in valid else 0
            self.report(where, reason, f"skipped with its {count} annotations" if count else "skipped")
        return valid, {image_id for _, _, image_id in skipped if image_id is not None} - valid.keys()

    def annotations(
        self,
        entries: list[Any],
        images: dict[int, dict[str, Any]],
        skipped: set[int],
        categories: dict[int, Any],
        need_masks: bool,
    ) -> list[dict[str, Any]]:
        """Return the valid annotations, with unique ids."""
        valid: list[dict[str, Any]] = []
        for index, entry in enumerate(entries):
            where = _where("annotation", entry, index)
            try:
                _require_ints(entry, "image_id", "category_id")
                if entry["image_id"] in skipped:
                    continue  # reported with its image
                if entry["image_id"] not in images:
                    raise InvalidAnnotation(f"image_id={entry['image_id']} is not among the images")
                if entry["category_id"] not in categories:
                    raise InvalidAnnotation(f"category_id={entry['category_id']} is not among the categories")
                valid.append(self.annotation(entry, where, images[entry["image_id"]], need_masks))
            except InvalidAnnotation as error:
                self.report(where, str(error), "skipped")
        # One line each: an exporter omits a key from all annotations or from none.
        for (key, places), action in zip(
            self.missing.items(), ("computed from the mask or box", "set to 0"), strict=True
        ):
            if places:
                reason = f"{len(places)} of {len(entries)} have no {key}, the first is {places[0]}"
                self.report("annotations", reason, action)
        self.renumber(valid)
        if not valid:
            self.report(
                "annotations", f"none of {len(entries)} is valid, so there is nothing to train on", "images kept"
            )
        elif all(annotation["iscrowd"] for annotation in valid):
            self.report("annotations", f"all {len(valid)} are crowds, so there is nothing to train on", "kept")
        return valid

    def annotation(self, entry: dict[str, Any], where: str, image: dict[str, Any], need_masks: bool) -> dict[str, Any]:
        """Return the valid form of one annotation."""
        note = partial(self.report, where)
        width, height = image["width"], image["height"]
        iscrowd, mask, area = entry.get("iscrowd"), entry.get("segmentation"), entry.get("area")
        if iscrowd not in (None, 0, 1):
            raise InvalidAnnotation(f"iscrowd={show(iscrowd)} is invalid: expected 0 or 1")
        box = _clean_box(entry.get("bbox"), width, height, note)
        valid = {"id": entry.get("id"), "image_id": image["id"], "category_id": entry["category_id"], "bbox": box}
        if need_masks or mask is not None:
            try:
                valid["segmentation"] = clean_mask(mask, width, height, note)
            except InvalidAnnotation as error:
                if need_masks:
                    raise
                note(str(error), "mask dropped, box kept")
        if not is_number(area) or area < 0:
            if area is None:
                self.missing["area"].append(where)
            else:
                note(f"area={show(area)} is invalid", "computed from the mask or box")
            area = mask_area(valid["segmentation"], width, height) if "segmentation" in valid else box[2] * box[3]
        if iscrowd is None:
            self.missing["iscrowd"].append(where)
        if entry.get("ignore"):  # Detectron2 rejects the key; crowds are likewise neither trained on nor evaluated
            iscrowd = 1
            note(f"ignore={show(entry['ignore'])} is not supported by Detectron2", "kept as a crowd (iscrowd=1)")
        return {**valid, "area": area, "iscrowd": int(iscrowd or 0)}

    def renumber(self, annotations: list[dict[str, Any]]) -> None:
        """Give a new id to each annotation whose id is missing, taken, or 0, which pycocotools reads as "no match"."""
        taken: set[int] = set()
        invalid = []
        for annotation in annotations:
            if is_int(annotation["id"]) and annotation["id"] != 0 and annotation["id"] not in taken:
                taken.add(annotation["id"])
            else:
                invalid.append(annotation)
        for new, annotation in enumerate(invalid, start=max(taken | {0}) + 1):
            old = annotation["id"]
            where = f"annotation {show(old)} of image {annotation['image_id']}"
            reason = "has the id of an earlier annotation" if is_int(old) and old else f"id={show(old)} is invalid"
            self.report(where, reason, f"kept as annotation {new}")
            annotation["id"] = new

    def images_without_valid(
        self, entries: list[Any], images: dict[int, dict[str, Any]], valid: list[dict[str, Any]]
    ) -> set[int]:
        """Return the images whose annotations, crowds aside, are all invalid; training skips them."""
        trained = {annotation["image_id"] for annotation in valid if not annotation["iscrowd"]}
        given = _count_by_image(entries, lambda entry: not entry.get("iscrowd") and not entry.get("ignore"))
        without = {image_id for image_id in images if given[image_id] and image_id not in trained}
        for image_id in sorted(without):
            self.report(
                f"image {image_id}", f"all of its {given[image_id]} annotations are invalid", SKIPPED_IN_TRAINING
            )
        return without


def _count_by_image(annotations: list[Any], condition: Callable[[dict[str, Any]], bool]) -> Counter[int]:
    return Counter(
        entry["image_id"]
        for entry in annotations
        if isinstance(entry, dict) and is_int(entry.get("image_id")) and condition(entry)
    )


def _where(kind: str, entry: Any, index: int) -> str:
    return f"{kind} {show(entry['id'])}" if isinstance(entry, dict) and "id" in entry else f"{kind} at index {index}"


def _read(json_file: Path) -> dict[str, Any]:
    try:
        content = json_file.read_bytes()
    except OSError as error:
        raise DatasetError(f"{json_file} cannot be read ({error.strerror or error}).") from error
    if not content.strip():
        raise DatasetError(f"{json_file} is empty ({len(content)} bytes).")
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{json_file} is not UTF-8 text (byte {error.start} of {len(content)}). Fix: save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno} of {len(content)} bytes"
        raise DatasetError(f"{json_file} is not valid JSON or is truncated ({error.msg} at {at}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of nested lists
        raise DatasetError(f"{json_file} cannot be parsed ({error}).") from error
    if not isinstance(data, dict):
        raise DatasetError(
            f"{json_file} contains {show(data)}: expected an object with 'images', 'annotations' and 'categories'."
        )
    return data


def _list(data: dict[str, Any], key: str, json_file: Path, required: bool) -> list[Any]:
    value = data.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list) or (required and not value):
        found = f"{key}={show(value)} is invalid" if key in data else f"{key!r} is missing"
        raise DatasetError(f"{json_file}: {found}: expected a list. Fix: export the file as COCO instances json.")
    return value


def _require_ints(entry: Any, *keys: str) -> None:
    if not isinstance(entry, dict):
        raise InvalidAnnotation(f"is {show(entry)}: expected an object")
    for key in keys:
        if key not in entry:
            raise InvalidAnnotation(f"{key} is missing")
        if not is_int(entry[key]):
            raise InvalidAnnotation(f"{key}={show(entry[key])} is invalid: expected an integer")


def _clean_category(entry: Any, valid: dict[int, Any]) -> dict[str, Any]:
    _require_ints(entry, "id")
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        raise InvalidAnnotation(f"name={show(entry.get('name'))} is invalid: expected a string")
    if entry["id"] in valid:
        raise InvalidAnnotation(f"{entry['name']!r} has the id of an earlier category, {valid[entry['id']]['name']!r}")
    return {key: entry[key] for key in ("id", "name", "supercategory") if isinstance(entry.get(key), (int, str))}


def _clean_image(entry: Any, image_dir: Path, valid: dict[int, Any]) -> dict[str, Any]:
    _require_ints(entry, "id", "width", "height")
    file_name, width, height = entry.get("file_name"), entry["width"], entry["height"]
    if not isinstance(file_name, str) or not file_name:
        raise InvalidAnnotation(f"file_name={show(file_name)} is invalid: expected a string")
    if width <= 0 or height <= 0:
        raise InvalidAnnotation(f"width={width}, height={height} is invalid: expected positive numbers")
    if entry["id"] in valid:
        earlier = show(valid[entry["id"]]["file_name"])
        raise InvalidAnnotation(f"{show(file_name)} has the id of an earlier image, {earlier}")
    path = image_dir / file_name
    if not os.path.isfile(path):
        raise InvalidAnnotation(f"{show(file_name)} is not in {image_dir}")
    try:
        size = _image_size(path)
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise InvalidAnnotation(
            f"{show(file_name)} cannot be opened as an image ({reason or type(error).__name__})"
        ) from error
    if size != (width, height):
        raise InvalidAnnotation(f"width={width}, height={height}, but {show(file_name)} is {size[0]} x {size[1]}")
    return {"id": entry["id"], "file_name": file_name, "width": width, "height": height}


def _image_size(path: Path) -> tuple[int, int]:
    """Return width and height after EXIF rotation, as Detectron2 reads them, from the header alone."""
    with Image.open(path) as image:
        width, height = image.size
        try:
            # The base class's method, as that of PNG decodes the whole image in search of late metadata.
            rotated = Image.Image.getexif(image).get(_EXIF_ORIENTATION) in _EXIF_ROTATED
        except Exception:  # Detectron2 ignores broken EXIF too
            rotated = False
    return (height, width) if rotated else (width, height)


def _clean_box(box: Any, width: int, height: int, note: Note) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise InvalidAnnotation(f"bbox={show(box)} is invalid: expected 4 finite numbers")
    check_box(box, width, height)
    x, y, w, h = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if max(left - x, top - y, x + w - right, y + h - bottom) <= TOLERANCE:
        return box
    note(f"bbox={box} extends outside the image of {width} x {height}", "clipped")
    return [left, top, right - left, bottom - top]
