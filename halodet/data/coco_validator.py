"""Validator of the lists of a COCO json: categories, images and annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halodet.data.annotation_screen import find_plain
from halodet.data.annotation_validator import AnnotationValidator, Turned, require_ids
from halodet.data.annotations import InvalidAnnotation, is_int, show
from halodet.data.conversions import convert_ids, convert_references, to_flag, to_int
from halodet.data.image_files import ImageFiles, UnreadableImage
from halodet.data.issues import IssueLog

from tqdm import tqdm

SKIPPED_IN_TRAINING = "skipped in training"  # action for an image that is valid COCO but cannot be trained on
COCO_MAX_DETECTIONS = 100  # per image, in COCO's own metrics and in Detectron2's default config
_SHOW_IMAGES, _SHOW_ANNOTATIONS = 1000, 50_000  # numbers from which a progress bar is shown
_CHUNK = 2000  # annotations that are screened at a time
_KEYS = ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd")


class _UnusableImage(InvalidAnnotation):
    """The entry of an image is valid, but its file cannot be used."""

    def __init__(self, reason: str, image: dict[str, Any], *, missing: bool = False) -> None:
        super().__init__(reason)
        self.image, self.missing = image, missing


class CocoValidator(IssueLog):
    """Validate the lists of one json: keep the valid entries and collect the issues of the others.

    The methods are called in the order ids, categories, images, annotations.

    Attributes:
        num_missing: number of images without a file.
        rewritten: whether the valid form of an annotation differs from what another program reads.
    """

    def __init__(self, json_file: Path) -> None:
        super().__init__(json_file)
        self.num_missing = 0
        self.rewritten = False
        self._turned: dict[int, Turned] = {}
        self._merged: dict[int, int] = {}  # id of an image -> of an earlier one that has the same file

    def ids(self, images: list[Any], categories: list[Any], annotations: list[Any]) -> None:
        """Give integer ids to all entries, and convert the references to them, in place."""
        for kind, entries in (("image", images), ("category", categories)):
            where = {"image": "images", "category": "categories"}[kind]
            new = convert_ids(entries, lambda reason, action, where=where: self.report(where, reason, action))
            name = f"{kind}_id"
            convert_references(annotations, name, new, lambda *issue: self.report("annotations", *issue))

    def categories(self, entries: list[Any]) -> dict[int, dict[str, Any]]:
        """Return the valid categories by id."""
        valid: dict[int, dict[str, Any]] = {}
        for index, entry in enumerate(entries):
            where = _where("category", entry, index)
            try:
                category = self._category(entry, where, valid)
                valid.setdefault(category["id"], category)
            except InvalidAnnotation as error:
                self.report(where, str(error), "skipped")
        self.report_counted("categories", len(entries))
        for name, count in Counter(category["name"] for category in valid.values()).items():
            if count > 1:
                self.report("categories", f"{count} have the name {show(name)}", "kept as separate classes")
        return valid

    def _category(self, entry: Any, where: str, valid: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        require_ids(entry, "id")
        name = entry.get("name")
        if isinstance(name, (int, float)) and not isinstance(name, bool):
            self.count(where, "have a number as their name", "converted to text")
            name = str(to_int(name) if to_int(name) is not None else name)
        if not isinstance(name, str) or not name:
            raise InvalidAnnotation(f"name={show(name)} is invalid: expected a string")
        earlier = valid.get(entry["id"])
        if earlier and earlier["name"] != name:
            raise InvalidAnnotation(f"{name!r} has the id of an earlier category, {earlier['name']!r}")
        if earlier:
            self.count(where, "repeat an earlier category", "dropped")
        category = {"id": entry["id"], "name": name}
        if isinstance(entry.get("supercategory"), (int, str)):
            category["supercategory"] = entry["supercategory"]
        names = entry.get("keypoints")
        if isinstance(names, list) and names and all(isinstance(point, str) for point in names):
            category["keypoints"] = names
        return category

    def images(
        self, entries: list[Any], image_dir: Path, annotations: list[Any], keep_unusable: bool
    ) -> tuple[dict[int, dict[str, Any]], set[int], set[int]]:
        """Return the valid images by id, the ids of the skipped ones, and those of valid ones with an unusable file.

        The last are kept only with ``keep_unusable``: their ground truth counts in an evaluation.
        """
        valid: dict[int, dict[str, Any]] = {}
        unusable: dict[int, tuple[str, str]] = {}
        skipped: list[tuple[str, str, int | None]] = []
        files, by_file = ImageFiles(image_dir, (_name_of(entry) for entry in entries)), dict[str, int]()
        names = _names_by_id(entries)
        for index, entry in enumerate(self._progress(entries, "images", len(entries) >= _SHOW_IMAGES)):
            try:
                image = self._image(entry, index, files, valid, names)
                first = by_file.setdefault(image["file_name"], image["id"])
                if first == image["id"] or self._turned.get(first) != self._turned.get(image["id"]):
                    valid[image["id"]] = image
                else:
                    self.count(_where("image", entry, index), "have the file of an earlier image", "merged with it")
                    self._merged[image["id"]] = first
            except InvalidAnnotation as error:
                where = _where("image", entry, index)
                self.num_missing += isinstance(error, _UnusableImage) and error.missing
                if keep_unusable and isinstance(error, _UnusableImage):
                    valid[error.image["id"]] = error.image
                    unusable[error.image["id"]] = where, str(error)
                    continue
                has_id = isinstance(entry, dict) and is_int(entry.get("id"))
                skipped.append((where, str(error), entry["id"] if has_id else None))
        self.report_counted("images", len(entries))
        used = _count_by_image(annotations, lambda entry: True) if skipped or unusable else Counter[int]()
        for where, reason, image_id in skipped:  # after the loop, as a later entry of the same id may be valid
            count = used[image_id] if image_id is not None and image_id not in valid else 0
            self.report(where, reason, f"skipped with its {count} annotations" if count else "skipped")
        for image_id, (where, reason) in unusable.items():
            self.report(where, reason, f"evaluated without detections, with its {used[image_id]} annotations")
        for entry in annotations if self._merged else ():
            if isinstance(entry, dict) and is_int(entry.get("image_id")):
                entry["image_id"] = self._merged.get(entry["image_id"], entry["image_id"])
        return valid, {image_id for _, _, image_id in skipped if image_id is not None} - valid.keys(), set(unusable)

    def _image(
        self,
        entry: Any,
        index: int,
        files: ImageFiles,
        valid: Mapping[int, dict[str, Any]],
        names: Mapping[int, list[str]],
    ) -> dict[str, Any]:
        def count(reason: str, action: str) -> None:
            self.count(_where("image", entry, index), reason, action)

        require_ids(entry, "id")
        image_id, width, height = (entry.get(key) for key in ("id", "width", "height"))
        name = _name_of(entry)
        if name is not None and entry.get("file_name") is None:
            count("have no file_name", "taken from coco_url")
        if not isinstance(name, str) or not name:
            raise InvalidAnnotation(f"file_name={show(name)} is invalid: expected a string")
        if image_id in valid and valid[image_id]["file_name"] == name:
            count("repeat an earlier image", "dropped")
            return valid[image_id]
        if len(names.get(image_id, ())) > 1:  # whose are the annotations?
            raise InvalidAnnotation(f"{show(name)} has the id of another image: {show(names[image_id])}")
        if not (is_int(width) and is_int(height)) and None not in (to_int(width or 0), to_int(height or 0)):
            if width and height:
                count("have a width or height that is no integer", "converted")
            width, height = to_int(width or 0), to_int(height or 0)
        known = is_int(width) and is_int(height) and width > 0 and height > 0
        if not known and (width, height).count(0) == 0:
            raise InvalidAnnotation(f"width={show(width)}, height={show(height)} is invalid: expected positive numbers")
        image = {"id": image_id, "file_name": name, "width": width, "height": height}
        try:
            found, real_width, real_height, orientation = files.measure(name)
        except UnreadableImage as error:
            if not known:
                raise InvalidAnnotation(f"width={width}, height={height}, and {error}") from error
            raise _UnusableImage(str(error), image, missing=error.missing) from error
        if found != entry.get("file_name", found):
            count(f"have a file_name that is spelled differently in {files.folder}", "found there")
        image["file_name"] = found
        if not known:
            count("have no width or height", "read from the image")
        elif (real_width, real_height) == (height, width) != (width, height) and orientation != 1:
            reason = f"have the size before rotation by EXIF (orientation {orientation})"
            count(reason, "annotations turned with the image")
            self._turned[image_id] = Turned(orientation, width, height)
        elif (real_width, real_height) != (width, height):
            real = f"{real_width} x {real_height}"
            raise _UnusableImage(f"width={width}, height={height}, but {show(name)} is {real}", image)
        return {**image, "width": real_width, "height": real_height}

    def annotations(
        self,
        entries: list[Any],
        images: dict[int, dict[str, Any]],
        skipped: set[int],
        categories: dict[int, Any],
        need_masks: bool,
        keep_maskless: bool,
        known_format: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the valid annotations, with unique ids; those that need no change are the entries themselves."""
        check = AnnotationValidator(self, images, categories, self._turned, need_masks, keep_maskless)
        if not known_format:
            check.find_formats(entries)
        sizes: dict[int, tuple[int, int]] = {}
        if not check.box_format and not check.fractions:
            sizes = {key: (image["width"], image["height"]) for key, image in images.items() if key not in self._turned}
        plain_categories = set() if check.keypoint_names else set(categories)
        valid: list[dict[str, Any]] = []
        chunks, shown = range(0, len(entries), _CHUNK), len(entries) >= _SHOW_ANNOTATIONS
        for start in self._progress(chunks, "annotations", shown, unit_scale=_CHUNK):
            chunk = entries[start : start + _CHUNK]
            plain = find_plain(chunk, sizes, plain_categories, need_masks=need_masks)
            for index, (entry, is_plain) in enumerate(zip(chunk, plain, strict=True), start=start):
                if is_plain:
                    self.rewritten |= "ignore" in entry and entry["ignore"] != 0
                    valid.append(_only_needed(entry))
                    continue
                where = _where("annotation", entry, index)
                try:
                    require_ids(entry, "image_id")
                    self.image_id = entry["image_id"]
                    if entry["image_id"] not in skipped:  # reported with its image
                        valid.append(check.validate(entry, where))
                        self.rewritten |= _differs(entry, valid[-1])
                except InvalidAnnotation as error:
                    self.report(where, str(error), "skipped")
                self.image_id = None
        valid = self._without_duplicates(valid)
        self._renumber(valid)
        self.report_counted("annotations", len(entries))
        self._note_surprises(entries, valid, categories)
        if not valid:
            self.report(
                "annotations", f"none of {len(entries)} is valid, so there is nothing to train on", "images kept"
            )
        elif all(annotation["iscrowd"] for annotation in valid):
            self.report("annotations", f"all {len(valid)} are crowds, so there is nothing to train on", "kept")
        return valid

    def _without_duplicates(self, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the annotations without those that repeat the image, class, box and mask of an earlier one."""
        seen: dict[int, dict[str, Any]] = {}
        kept = []
        for annotation in annotations:
            key = hash((annotation["image_id"], annotation["category_id"], *annotation["bbox"]))
            if key in seen and not _same(annotation, seen[key]):
                key = hash((key, repr(annotation.get("segmentation")), annotation["iscrowd"]))
            while key in seen and not _same(annotation, seen[key]):
                key += 1
            if key in seen:
                self.count(f"annotation {show(annotation['id'])}", "repeat an earlier annotation", "dropped")
            else:
                seen[key] = annotation
                kept.append(annotation)
        return kept

    def _note_surprises(
        self, entries: list[Any], annotations: list[dict[str, Any]], categories: dict[int, Any]
    ) -> None:
        """Note how many annotations are crowds, which classes have none, and images with very many objects."""
        ignored = {entry.get("id") for entry in entries if isinstance(entry, dict) and to_flag(entry.get("ignore"))}
        crowds = Counter(
            entry["category_id"] for entry in annotations if entry["iscrowd"] and entry["id"] not in ignored
        )
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
                "TEST.DETECTIONS_PER_IMAGE (in a LazyConfig test_topk_per_image) to this number"
            )

    def _renumber(self, annotations: list[dict[str, Any]]) -> None:
        """Give a new id to each annotation whose id is missing, taken, or 0, which pycocotools reads as "no match"."""
        taken: set[int] = set()
        invalid = []
        for annotation in annotations:
            number = annotation["id"]
            if type(number) is not int and to_int(number) is not None and not isinstance(number, bool):
                self.count(f"annotation {show(number)}", "have an id that is no integer", "converted")
                number = annotation["id"] = to_int(number)
            if is_int(number) and number != 0 and number not in taken:
                taken.add(number)
            else:
                invalid.append(annotation)
        for new, annotation in enumerate(invalid, start=max(taken | {0}) + 1):
            old = annotation["id"]
            where = f"annotation {show(old)} of image {annotation['image_id']}"
            if is_int(old) and old:
                self.report(where, "has the id of an earlier annotation", f"kept as annotation {new}")
            else:
                kind = "have no id" if old is None else "have an id that is 0 or no integer"
                self.count(where, kind, "renumbered")
            annotation["id"] = new

    def images_without_valid(
        self, entries: list[Any], images: dict[int, dict[str, Any]], valid: list[dict[str, Any]]
    ) -> set[int]:
        """Return the images whose annotations, crowds aside, are all invalid; training skips them."""
        trained = {annotation["image_id"] for annotation in valid if not annotation["iscrowd"]}
        untrained = images.keys() - trained

        def is_object(entry: dict[str, Any]) -> bool:
            return entry["image_id"] in untrained and not any(to_flag(entry.get(key)) for key in ("iscrowd", "ignore"))

        given = _count_by_image(entries, is_object)
        for image_id in sorted(given):
            self.report(
                f"image {image_id}", f"all of its {given[image_id]} annotations are invalid", SKIPPED_IN_TRAINING
            )
        return set(given)

    def _progress(self, items: Any, kind: str, shown: bool, **options: Any) -> tqdm:
        unit = kind.removesuffix("s")
        return tqdm(items, desc=f"checking {kind} of {self.file}", unit=unit, disable=not shown, **options)


def _name_of(entry: Any) -> Any:
    """Return the file name of an image; LVIS has its last folder and name in the URL."""
    if not isinstance(entry, dict):
        return None
    name, url = entry.get("file_name"), entry.get("coco_url")
    return "/".join(url.split("/")[-2:]) if name is None and isinstance(url, str) else name


def _names_by_id(entries: list[Any]) -> dict[int, list[str]]:
    """Return the different file names of each id."""
    names: dict[int, list[str]] = {}
    for entry in entries:
        name = _name_of(entry)
        if isinstance(name, str) and name and is_int(entry.get("id")):
            found = names.setdefault(entry["id"], [name])
            if name not in found:
                found.append(name)
    return names


def _differs(entry: dict[str, Any], valid: dict[str, Any]) -> bool:
    """Return whether another program would read an entry differently from its valid form."""
    if any(key not in entry or entry[key] != value for key, value in valid.items()):
        return True
    dropped = entry.get("segmentation") and "segmentation" not in valid
    return bool(dropped) or ("ignore" in entry and entry["ignore"] != 0)


def _only_needed(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a valid annotation with the keys of COCO only."""
    if len(entry) == len(_KEYS) and entry.get("segmentation"):
        return entry
    return {key: entry[key] for key in _KEYS if key in entry and (key != "segmentation" or entry[key])}


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two annotations differ in their ids and areas at most."""
    keys = ("image_id", "category_id", "bbox", "iscrowd", "segmentation", "keypoints")
    return all(first.get(key) == second.get(key) for key in keys)


def _count_by_image(annotations: list[Any], condition: Callable[[dict[str, Any]], bool]) -> Counter[int]:
    return Counter(
        entry["image_id"]
        for entry in annotations
        if isinstance(entry, dict) and is_int(entry.get("image_id")) and condition(entry)
    )


def _where(kind: str, entry: Any, index: int) -> str:
    if isinstance(entry, dict) and "_source" in entry:  # the place in a YOLO or VOC file
        return str(entry["_source"])
    return f"{kind} {show(entry['id'])}" if isinstance(entry, dict) and "id" in entry else f"{kind} at index {index}"
