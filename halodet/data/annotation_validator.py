"""Validator of single annotations of a COCO json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from halodet.data import annotations as checks
from halodet.data.annotations import InvalidAnnotation, Note, is_int, is_number, mask_box, show
from halodet.data.box_format import AGREE, BoxFormat, are_fractions, find_box_format, matching_format
from halodet.data.conversions import convert_annotation, turn_annotation, turn_rle
from halodet.data.issues import IssueLog

_TOLERATED = 2.0  # pixels by which boxes of tiny objects differ from their masks
_SAMPLE = 1000  # annotations from which the format of a file's boxes is found


@dataclass(frozen=True)
class Turned:
    """An image whose annotations are in the pixels of the file before EXIF rotation: orientation and size there."""

    orientation: int
    width: int
    height: int


@dataclass
class AnnotationValidator:
    """Return the valid form of annotations, and log the issues.

    Attributes:
        log: where the issues go.
        images: usable images by id.
        categories: categories by id.
        turned: images whose annotations are in the pixels of the file before EXIF rotation.
        need_masks: whether an annotation without a valid mask is invalid.
        keep_maskless: keep the box of such an annotation nevertheless.
        box_format: how all boxes are written, None for COCO's form.
        fractions: whether the coordinates of masks and keypoints are fractions of the image.
    """

    log: IssueLog
    images: Mapping[int, dict[str, Any]]
    categories: Mapping[int, dict[str, Any]]
    turned: Mapping[int, Turned]
    need_masks: bool
    keep_maskless: bool
    box_format: BoxFormat | None = field(default=None, init=False)
    fractions: bool = field(default=False, init=False)

    @cached_property
    def keypoint_names(self) -> list[str]:
        """Keypoints of the first category that has them: Detectron2 reads as many of every object."""
        return next((category["keypoints"] for category in self.categories.values() if "keypoints" in category), [])

    def find_formats(self, entries: Sequence[Any]) -> None:
        """Find how boxes and masks are written, from a sample of the annotations."""
        sample = []
        for entry in entries[:: max(1, len(entries) // _SAMPLE)]:
            try:
                image = self.images[entry["image_id"]]
                entry = convert_annotation(entry, _ignore)
                box, mask = entry.get("bbox"), entry["segmentation"]
                if entry.get("iscrowd") == 1 or image["id"] in self.turned or not _is_box(box):
                    continue
                size = image["width"], image["height"]
                extent = mask_box(checks.clean_mask(mask, *size), *size) if mask else None
                sample.append((box, extent, *size))
            except (InvalidAnnotation, KeyError, TypeError):
                continue
        self.fractions = are_fractions(sample)
        if self.fractions:
            sample = [(box, extent and _scale(extent, w, h), w, h) for box, extent, w, h in sample]
        self.box_format = find_box_format(sample)

    def validate(self, entry: Any, where: str) -> dict[str, Any]:
        """Return the valid form of one annotation.

        Args:
            entry: the annotation.
            where: its name in an issue.

        Raises:
            InvalidAnnotation: it has none.
        """
        require_ids(entry, "image_id", "category_id")
        if entry["image_id"] not in self.images:
            raise InvalidAnnotation(f"image_id={entry['image_id']} is not among the images")
        if entry["category_id"] not in self.categories:
            raise InvalidAnnotation(f"category_id={entry['category_id']} is not among the categories")
        image = self.images[entry["image_id"]]
        entry = convert_annotation(entry, lambda reason, action: self.log.count(where, reason, action))
        turned = self.turned.get(image["id"])
        size = (turned.width, turned.height) if turned else (image["width"], image["height"])
        entry = self._to_pixels(entry, where, *size)
        if turned:
            entry = turn_annotation(entry, turned.orientation, turned.width, turned.height)
            if isinstance(entry["segmentation"], dict):
                rle = checks.clean_mask(entry["segmentation"], turned.width, turned.height)
                entry["segmentation"] = turn_rle(rle, turned.orientation)
        valid = self._shape(entry, where, image)
        names = self.categories[entry["category_id"]].get("keypoints") or self.keypoint_names
        return {**valid, **self._keypoints(entry, where, len(names))} if names else valid

    def _to_pixels(self, entry: dict[str, Any], where: str, width: int, height: int) -> dict[str, Any]:
        """Convert an annotation of a file that has another format of boxes or fractions for masks."""
        box, mask, points = entry.get("bbox"), entry["segmentation"], entry.get("keypoints")
        if self.box_format and _is_box(box):
            entry["bbox"] = self.box_format.to_coco(box, width, height)
            self.log.count(where, f"have a box that is written as {self.box_format.name}", "converted")
        if self.fractions and isinstance(mask, list):
            numbers = [polygon for polygon in mask if isinstance(polygon, list) and all(map(is_number, polygon))]
            entry["segmentation"] = [_scale(polygon, width, height) for polygon in numbers]
            self.log.count(where, "have a mask in fractions of the image", "converted")
        fractions = self.fractions or (self.box_format is not None and "fractions" in self.box_format.name)
        if fractions and isinstance(points, list) and len(points) % 3 == 0 and all(map(is_number, points)):
            triples = zip(points[::3], points[1::3], points[2::3], strict=True)
            entry["keypoints"] = [number for x, y, seen in triples for number in (x * width, y * height, seen)]
        return entry

    def _shape(self, entry: dict[str, Any], where: str, image: dict[str, Any]) -> dict[str, Any]:
        """Return the annotation without keypoints."""
        changes: list[str] = []

        def note(reason: str, action: str) -> None:
            changes.append(action)
            self.log.report(where, reason, action)

        width, height = image["width"], image["height"]
        iscrowd, mask, area = entry.get("iscrowd"), entry["segmentation"], entry.get("area")
        if iscrowd not in (None, 0, 1):
            raise InvalidAnnotation(f"iscrowd={show(iscrowd)} is invalid: expected 0 or 1")
        given = entry.get("bbox")
        if given is None and mask:  # whether it is a valid one is checked below
            given = mask_box(checks.clean_mask(mask, width, height), width, height)
            self.log.count(where, "have no bbox", "computed from the mask")
        clipped: list[tuple[str, str]] = []
        try:
            box = _clean_box(given, width, height, lambda *issue: clipped.append(issue))
        except InvalidAnnotation as error:
            given = box = self._mask_box(mask, width, height, error)
            self.log.report(where, str(error), "box taken from the mask")
        valid = {"id": entry.get("id"), "image_id": image["id"], "category_id": entry["category_id"], "bbox": box}
        if self.need_masks or mask is not None:
            try:
                valid["segmentation"] = checks.clean_mask(mask, width, height, note)
            except InvalidAnnotation as error:
                if self.need_masks and not self.keep_maskless:
                    raise
                action = "ignored in mask AP, box kept" if self.need_masks else "mask dropped, box kept"
                self.log.report(where, str(error), action)
        whole = isinstance(mask, dict) or len(valid.get("segmentation", ())) == len(mask or ())
        if "segmentation" in valid and whole and not iscrowd:
            agreeing = self._agreeing_box(where, given, box, valid["segmentation"], width, height)
            if agreeing is not box:
                box = valid["bbox"] = agreeing
                clipped.clear()
        for issue in clipped:
            note(*issue)
        if min(box[2:]) < checks.MIN_BOX:
            self.log.count(where, f"have a box of less than {checks.MIN_BOX} pixels", "kept")
        if not is_number(area) or area <= 0 or changes:
            computed = "computed from the mask or box"
            if area is None:
                self.log.count(where, "have no area", computed)
            elif is_number(area) and area == 0:
                self.log.count(where, "have an area of 0", computed)
            elif not is_number(area) or area < 0:
                note(f"area={show(area)} is invalid", computed)
            area = (
                checks.mask_area(valid["segmentation"], width, height) if "segmentation" in valid else box[2] * box[3]
            )
        if iscrowd is None:
            self.log.count(where, "have no iscrowd", "set to 0")
        if entry.get("ignore"):  # Detectron2 rejects the key; crowds are likewise neither trained on nor evaluated
            iscrowd = 1
            note(f"ignore={show(entry['ignore'])} is not supported by Detectron2", "kept as a crowd (iscrowd=1)")
        return {**valid, "area": area, "iscrowd": int(iscrowd or 0)}

    @staticmethod
    def _mask_box(mask: Any, width: int, height: int, error: InvalidAnnotation) -> list[float]:
        """Return the box of the mask; raise the error of the annotation's own box if there is no valid mask."""
        try:
            return mask_box(checks.clean_mask(mask, width, height), width, height)
        except InvalidAnnotation:
            raise error from None

    def _agreeing_box(
        self,
        where: str,
        given: list[float],
        box: list[float],
        mask: list[list[float]] | dict[str, Any],
        width: int,
        height: int,
    ) -> list[float]:
        """Return ``box``, or that of the mask if they disagree; count the likely cause."""
        extent = mask_box(mask, width, height)
        if checks.box_iou(box, extent) >= AGREE:
            return box
        if max(abs(a - b) for a, b in zip(_corners(box), _corners(extent), strict=True)) <= _TOLERATED:
            return box
        cause = matching_format(given, extent, width, height)
        likely = f" (boxes are written as {cause.name})" if cause else ""
        self.log.count(where, f"have a box beside their mask{likely}", "box taken from the mask")
        return extent

    def _keypoints(self, entry: dict[str, Any], where: str, count: int) -> dict[str, Any]:
        """Return the keypoints of an annotation whose category names ``count`` of them."""
        points = entry.get("keypoints")
        reason = ""
        if points is not None:
            if not isinstance(points, list) or len(points) != 3 * count or not all(map(is_number, points)):
                expected = f"{3 * count} numbers, x, y and visibility for each of the category's {count}"
                reason = f"keypoints={show(points)} are invalid: expected {expected}"
            elif not set(points[2::3]) <= {0, 1, 2}:
                reason = f"keypoints have visibility {show(points[2::3])}: expected 0, 1 or 2"
        if reason:
            self.log.report(where, reason, "dropped, box kept")
        if points is None or reason:
            points = [0] * (3 * count)  # COCO's form of an object without labeled keypoints
        return {"keypoints": points, "num_keypoints": sum(visible > 0 for visible in points[2::3])}


def require_ids(entry: Any, *keys: str) -> None:
    """Check that an entry is an object with integer ids.

    Raises:
        InvalidAnnotation: it is not.
    """
    if not isinstance(entry, dict):
        raise InvalidAnnotation(f"is {show(entry)}: expected an object")
    for key in keys:
        if key not in entry:
            raise InvalidAnnotation(f"{key} is missing")
        if not is_int(entry[key]):
            raise InvalidAnnotation(f"{key}={show(entry[key])} is invalid: expected an integer")


def _ignore(reason: str, action: str) -> None:
    """Do not count a conversion: it is counted when the annotation is validated."""


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def _scale(coordinates: Sequence[float], width: int, height: int) -> list[float]:
    """Return coordinates x, y, x, y, ... in pixels, given fractions of the image."""
    return [value * (height if index % 2 else width) for index, value in enumerate(coordinates)]


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _clean_box(box: Any, width: int, height: int, note: Note) -> list[float]:
    if not _is_box(box):
        raise InvalidAnnotation(f"bbox={show(box)} is invalid: expected 4 finite numbers")
    checks.check_box(box, width, height)
    x, y, w, h = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if max(left - x, top - y, x + w - right, y + h - bottom) <= checks.TOLERANCE:
        return box
    note(f"bbox={box} extends outside the image of {width} x {height}", "clipped")
    return [left, top, right - left, bottom - top]
