"""Validator of the lists of a COCO json: categories, images and annotations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from halodet.data import annotations as checks
from halodet.data.annotations import InvalidAnnotation, Note, is_int, is_number, mask_box, show

from PIL import Image
from tqdm import tqdm

SKIPPED_IN_TRAINING = "skipped in training"  # action for an image that is valid COCO but cannot be trained on
_EXIF_ORIENTATION, _EXIF_ROTATED = 0x0112, (5, 6, 7, 8)
COCO_MAX_DETECTIONS = 100  # per image, in COCO's own metrics and in Detectron2's default config
_AGREE = 0.5  # IoU of a box with its mask's, below which one of them is wrong
_TOLERATED = 2.0  # pixels by which boxes of tiny objects differ
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


class _UnusableImage(InvalidAnnotation):
    """The entry of an image is valid, but its file cannot be used."""

    def __init__(self, reason: str, image: dict[str, Any]) -> None:
        super().__init__(reason)
        self.image = image


class CocoValidator:
    """Validate the lists of one json: keep the valid entries and collect the issues of the others."""

    def __init__(self, json_file: Path) -> None:
        self.file = json_file.name
        self.issues: list[Issue] = []
        self.notes: list[str] = []
        self.counted: dict[tuple[str, str], list[str]] = {}  # places of each kind of issue that has one line

    def report(self, where: str, reason: str, action: str) -> None:
        self.issues.append(Issue(self.file, where, reason, action))

    def count(self, where: str, reason: str, action: str) -> None:
        """Report an issue together with all others of the same kind, by :meth:`report_counted`."""
        self.counted.setdefault((reason, action), []).append(where)

    def report_counted(self, total: int) -> None:
        """Report each counted kind of issue in one line: an exporter makes a mistake in all annotations or in none."""
        for (reason, action), places in self.counted.items():
            self.report("annotations", f"{len(places)} of {total} {reason}, the first is {places[0]}", action)

    def note(self, text: str) -> None:
        """Add a remark on something that is no mistake."""
        self.notes.append(f"{self.file}: {text}")

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
        self, entries: list[Any], image_dir: Path, annotations: list[Any], keep_unusable: bool
    ) -> tuple[dict[int, dict[str, Any]], set[int], set[int]]:
        """Return the valid images by id, the ids of the skipped ones, and those of valid ones with an unusable file.

        The last are kept only with ``keep_unusable``: their ground truth counts in an evaluation.
        """
        valid: dict[int, dict[str, Any]] = {}
        unusable: dict[int, tuple[str, str]] = {}
        used = _count_by_image(annotations, lambda entry: True)
        skipped: list[tuple[str, str, int | None]] = []
        bar = partial(tqdm, desc=f"checking images of {self.file}", unit="image", disable=len(entries) < _SHOW_PROGRESS)
        for index, entry in enumerate(bar(entries)):
            try:
                image = _clean_image(entry, image_dir, valid)
                valid[image["id"]] = image
            except InvalidAnnotation as error:
                if keep_unusable and isinstance(error, _UnusableImage):
                    valid[error.image["id"]] = error.image
                    unusable[error.image["id"]] = _where("image", entry, index), str(error)
                    continue
                has_id = isinstance(entry, dict) and is_int(entry.get("id"))
                skipped.append((_where("image", entry, index), str(error), entry["id"] if has_id else None))
        for where, reason, image_id in skipped:  # after the loop, as a later entry of the same id may be valid
            count = used[image_id] if image_id is not None and image_id not in valid else 0
            self.report(where, reason, f"skipped with its {count} annotations" if count else "skipped")
        for image_id, (where, reason) in unusable.items():
            self.report(where, reason, f"evaluated without detections, with its {used[image_id]} annotations")
        return valid, {image_id for _, _, image_id in skipped if image_id is not None} - valid.keys(), set(unusable)

    def annotations(
        self,
        entries: list[Any],
        images: dict[int, dict[str, Any]],
        skipped: set[int],
        categories: dict[int, Any],
        need_masks: bool,
        keep_maskless: bool,
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
                annotation = self.annotation(entry, where, images[entry["image_id"]], need_masks, keep_maskless)
                names = categories[entry["category_id"]].get("keypoints", ())
                valid.append(annotation | self.keypoints(entry, where, len(names)))
            except InvalidAnnotation as error:
                self.report(where, str(error), "skipped")
        valid = self.without_duplicates(valid)
        self.report_counted(len(entries))
        self.renumber(valid)
        self.note_crowds(valid, categories)
        if not valid:
            self.report(
                "annotations", f"none of {len(entries)} is valid, so there is nothing to train on", "images kept"
            )
        elif all(annotation["iscrowd"] for annotation in valid):
            self.report("annotations", f"all {len(valid)} are crowds, so there is nothing to train on", "kept")
        return valid

    def annotation(
        self, entry: dict[str, Any], where: str, image: dict[str, Any], need_masks: bool, keep_maskless: bool
    ) -> dict[str, Any]:
        """Return the valid form of one annotation; with ``keep_maskless`` also if it has no valid mask."""
        changes: list[str] = []

        def note(reason: str, action: str) -> None:
            changes.append(action)
            self.report(where, reason, action)

        width, height = image["width"], image["height"]
        iscrowd, mask, area = entry.get("iscrowd"), entry.get("segmentation"), entry.get("area")
        if iscrowd not in (None, 0, 1):
            raise InvalidAnnotation(f"iscrowd={show(iscrowd)} is invalid: expected 0 or 1")
        given = entry.get("bbox")
        if given is None and mask:  # whether it is a valid one is checked below
            given = mask_box(checks.clean_mask(mask, width, height), width, height)
            self.count(where, "have no bbox", "computed from the mask")
        box = _clean_box(given, width, height, note)
        valid = {"id": entry.get("id"), "image_id": image["id"], "category_id": entry["category_id"], "bbox": box}
        if need_masks or mask not in (None, []):
            try:
                valid["segmentation"] = checks.clean_mask(mask, width, height, note)
            except InvalidAnnotation as error:
                if need_masks and not keep_maskless:
                    raise
                action = "ignored in mask AP, box kept" if need_masks else "mask dropped, box kept"
                self.report(where, str(error), action)
        whole = isinstance(mask, dict) or len(valid.get("segmentation", ())) == len(mask or ())
        if "segmentation" in valid and whole and not iscrowd:
            box = valid["bbox"] = self.agreeing_box(where, given, box, valid["segmentation"], (width, height))
        if not is_number(area) or area <= 0 or changes:
            computed = "computed from the mask or box"
            if area is None:
                self.count(where, "have no area", computed)
            elif is_number(area) and area == 0:
                self.count(where, "have an area of 0", computed)
            elif not is_number(area) or area < 0:
                note(f"area={show(area)} is invalid", computed)
            area = (
                checks.mask_area(valid["segmentation"], width, height) if "segmentation" in valid else box[2] * box[3]
            )
        if iscrowd is None:
            self.count(where, "have no iscrowd", "set to 0")
        if entry.get("ignore"):  # Detectron2 rejects the key; crowds are likewise neither trained on nor evaluated
            iscrowd = 1
            note(f"ignore={show(entry['ignore'])} is not supported by Detectron2", "kept as a crowd (iscrowd=1)")
        return {**valid, "area": area, "iscrowd": int(iscrowd or 0)}

    def agreeing_box(
        self,
        where: str,
        given: list[float],
        box: list[float],
        mask: list[list[float]] | dict[str, Any],
        size: tuple[int, int],
    ) -> list[float]:
        """Return ``box``, or that of the mask if they disagree; report the likely cause."""
        extent = mask_box(mask, *size)
        if checks.box_iou(box, extent) >= _AGREE:
            return box
        if max(abs(a - b) for a, b in zip(_corners(box), _corners(extent), strict=True)) <= _TOLERATED:
            return box
        x, y, w, h = given
        causes = {
            "boxes are written as x1, y1, x2, y2": [x, y, w - x, h - y],
            "boxes are fractions of the image": [x * size[0], y * size[1], w * size[0], h * size[1]],
            "boxes are written as their center": [x - w / 2, y - h / 2, w, h],
        }
        cause = next((text for text, other in causes.items() if checks.box_iou(other, extent) >= _AGREE), "")
        self.count(where, "have a box beside their mask" + f" ({cause})" * bool(cause), "box taken from the mask")
        return extent

    def without_duplicates(self, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the annotations without those that repeat the image, class, box and mask of an earlier one."""
        kept: dict[str, dict[str, Any]] = {}
        for annotation in annotations:
            parts = [annotation[key] for key in ("image_id", "category_id", "bbox", "iscrowd")]
            key = repr((parts, annotation.get("segmentation"), annotation.get("keypoints")))
            if key in kept:
                self.count(f"annotation {show(annotation['id'])}", "repeat an earlier annotation", "dropped")
            else:
                kept[key] = annotation
        return list(kept.values())

    def note_crowds(self, annotations: list[dict[str, Any]], categories: dict[int, Any]) -> None:
        """Note how many annotations are crowds, which classes have none, and images with very many objects."""
        crowds = Counter(entry["category_id"] for entry in annotations if entry["iscrowd"])
        if crowds:
            parts = ", ".join(f"{count} {categories[key]['name']}" for key, count in crowds.most_common(10))
            self.note(
                f"{crowds.total()} of {len(annotations)} annotations are crowds (iscrowd=1), not trained on: {parts}. "
                "CVAT's brush, Datumaro, Darwin and supervision mark single objects as crowds too. Fix, if these are: "
                "--crowds-as-objects"
            )
        used = {entry["category_id"] for entry in annotations}
        unused = [category["name"] for key, category in categories.items() if key not in used]
        if unused and used:
            more = f" and {len(unused) - 10} more" if len(unused) > 10 else ""
            self.note(f"{len(unused)} of {len(categories)} classes have no annotation: {', '.join(unused[:10])}{more}")
        dense = [n for n in Counter(entry["image_id"] for entry in annotations).values() if n > COCO_MAX_DETECTIONS]
        if dense:
            self.note(
                f"{len(dense)} images have more than {COCO_MAX_DETECTIONS} objects, at most {max(dense)}. Fix: set "
                "TEST.DETECTIONS_PER_IMAGE to this number"
            )

    def keypoints(self, entry: dict[str, Any], where: str, count: int) -> dict[str, Any]:
        """Return the keypoints of an annotation whose category names ``count`` of them."""
        points = entry.get("keypoints")
        if not count:
            return {}
        reason = ""
        if points is not None:
            if not isinstance(points, list) or len(points) != 3 * count or not all(map(is_number, points)):
                expected = f"{3 * count} numbers, x, y and visibility for each of the category's {count}"
                reason = f"keypoints={show(points)} are invalid: expected {expected}"
            elif not set(points[2::3]) <= {0, 1, 2}:
                reason = f"keypoints have visibility {show(points[2::3])}: expected 0, 1 or 2"
        if reason:
            self.report(where, reason, "dropped, box kept")
        if points is None or reason:
            points = [0] * (3 * count)  # COCO's form of an object without labeled keypoints
        return {"keypoints": points, "num_keypoints": sum(visible > 0 for visible in points[2::3])}

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


def _corners(box: list[float]) -> tuple[float, float, float, float]:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _count_by_image(annotations: list[Any], condition: Callable[[dict[str, Any]], bool]) -> Counter[int]:
    return Counter(
        entry["image_id"]
        for entry in annotations
        if isinstance(entry, dict) and is_int(entry.get("image_id")) and condition(entry)
    )


def _where(kind: str, entry: Any, index: int) -> str:
    return f"{kind} {show(entry['id'])}" if isinstance(entry, dict) and "id" in entry else f"{kind} at index {index}"


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
    category = {key: entry[key] for key in ("id", "name", "supercategory") if isinstance(entry.get(key), (int, str))}
    names = entry.get("keypoints")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        category["keypoints"] = names
    return category


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
    image = {"id": entry["id"], "file_name": file_name, "width": width, "height": height}
    path = image_dir / file_name
    if not os.path.isfile(path):
        raise _UnusableImage(f"{show(file_name)} is not in {image_dir}", image)
    try:
        size = _image_size(path)
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise _UnusableImage(
            f"{show(file_name)} cannot be opened as an image ({reason or type(error).__name__})", image
        ) from error
    if size != (width, height):
        raise _UnusableImage(f"width={width}, height={height}, but {show(file_name)} is {size[0]} x {size[1]}", image)
    return image


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
    checks.check_box(box, width, height)
    x, y, w, h = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if max(left - x, top - y, x + w - right, y + h - bottom) <= checks.TOLERANCE:
        return box
    note(f"bbox={box} extends outside the image of {width} x {height}", "clipped")
    return [left, top, right - left, bottom - top]
