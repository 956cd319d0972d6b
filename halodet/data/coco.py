"""Validation of a user's COCO json, and registration of its valid part with Detectron2.

Detectron2 and pycocotools stop or crash on many mistakes without naming the entry. Here each invalid entry is skipped
and listed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halodet.data.annotation_files import read_annotations
from halodet.data.annotations import is_int, show
from halodet.data.coco_records import keypoint_names, register_cleaned
from halodet.data.coco_validator import CocoValidator
from halodet.data.conversions import is_empty, to_flag
from halodet.data.issues import Issue
from halodet.data.yolo_voc import is_yolo_or_voc
from halodet.errors import DatasetError
from halodet.utils.gc_pause import paused_gc
from halodet.utils.io import atomic_write, write_json

from detectron2.data import DatasetCatalog, MetadataCatalog


@dataclass(frozen=True)
class ValidatedCoco:
    """The valid part of a COCO json, and the issues of the rest.

    Attributes:
        json_file: the json that was read.
        image_dir: folder that its file names are relative to.
        dataset: COCO dict of ``images``, ``annotations`` and ``categories`` (sorted by id); boxes are (x, y, width,
            height) in pixels.
        issues: in the order of the json's entries; empty if all entries are valid.
        notes: remarks on what is valid but may surprise: crowds, classes without annotations, very many objects.
        parent: the category that was dropped because it is only the supercategory of the others.
        unchanged: whether the json itself contains what ``dataset`` contains, for any reader.
    """

    json_file: Path
    image_dir: Path
    dataset: dict[str, Any]
    issues: list[Issue]
    notes: list[str] = field(default_factory=list)
    parent: dict[str, Any] | None = None
    unchanged: bool = False

    @property
    def keypoint_names(self) -> list[str]:
        """Keypoint names of the first category that has them; empty if none has."""
        return keypoint_names(self.dataset["categories"])

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
            if self.unchanged:
                atomic_write(path, lambda file: shutil.copyfile(self.json_file, file))
            else:
                write_json(path, self.dataset)
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be written ({error.strerror or error}). Fix: give another path."
            ) from error


@paused_gc()
def validate_coco(
    json_file: str | Path,
    image_dir: str | Path | None,
    *,
    split: str = "train",
    need_masks: bool = True,
    require_annotations: bool = False,
    evaluation: bool = False,
    crowds_as_objects: bool = False,
) -> ValidatedCoco:
    """Read a COCO json, keep the entries that Detectron2 can use, and list the issues of the others.

    Nothing is written. Only image headers are read, so a truncated image is not found.

    Args:
        json_file: COCO instances annotations, a YOLO data.yaml, or a folder of Pascal VOC xml files.
        image_dir: folder that the json's file names are relative to; may be None for YOLO and VOC.
        split: split of a data.yaml to read, ``"train"`` or ``"val"``.
        need_masks: skip annotations without a valid mask; otherwise only their mask is dropped.
        require_annotations: the json is for training: require at least one annotation that is not a crowd, and drop
            images all of whose annotations are invalid.
        evaluation: the json is for evaluation: keep the ground truth of images whose file is missing or unusable, and
            the boxes of annotations without a valid mask.
        crowds_as_objects: treat annotations with iscrowd=1 as single objects.

    Raises:
        DatasetError: the file is unreadable, is not COCO json, or has no valid image or category.
    """
    json_file = Path(json_file)
    data, image_dir, portable = read_annotations(json_file, image_dir, split)
    image_entries, category_entries, annotation_entries = (data[key] for key in ("images", "categories", "annotations"))
    entries = [entry for entry in annotation_entries if isinstance(entry, dict)]
    if need_masks and not evaluation and entries and all(is_empty(entry.get("segmentation")) for entry in entries):
        raise DatasetError(
            f"{json_file} has boxes and no masks. Fix: train without masks (--config-file faster_rcnn_halo_h4, or "
            "MODEL.MASK_ON False); tools/check_dataset.py takes --boxes-only."
        )
    validator = CocoValidator(json_file)
    for entry in entries if crowds_as_objects else ():
        if to_flag(entry.get("iscrowd")) == 1:
            entry["iscrowd"] = 0
    validator.ids(image_entries, category_entries, annotation_entries)
    categories, parent = without_parent(validator.categories(category_entries), annotation_entries, validator)
    if not categories:
        raise DatasetError(f"{json_file}: none of {len(category_entries)} categories is valid ({validator.first()}).")
    first = len(validator.issues)
    images, skipped, unusable = validator.images(image_entries, image_dir, annotation_entries, evaluation)
    if not images.keys() - unusable:
        raise DatasetError(
            f"{json_file}: none of its {len(image_entries)} images is valid in {image_dir} ({validator.first(first)})."
            + " Fix: give the folder that the file names are relative to." * (validator.num_missing > 0)
        )
    first = len(validator.issues)
    known_format = is_yolo_or_voc(json_file)
    annotations = validator.annotations(
        annotation_entries, images, skipped, categories, need_masks, evaluation, known_format
    )
    if require_annotations and all(annotation["iscrowd"] for annotation in annotations):
        raise DatasetError(
            f"{json_file}: none of its {len(annotation_entries)} annotations can be trained on "
            f"({validator.first(first)}); at least one valid annotation that is not a crowd is needed."
            + " Fix, if single objects are marked as crowds: --crowds-as-objects."
            * bool(annotations)
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
    unchanged = (
        portable and "info" in data and not (validator.issues or validator.rewritten or parent or crowds_as_objects)
    )
    return ValidatedCoco(json_file, image_dir, dataset, validator.issues, validator.notes, parent, unchanged)


def without_parent(
    categories: dict[int, dict[str, Any]], annotations: list[Any], validator: CocoValidator
) -> tuple[dict[int, dict[str, Any]], dict[str, Any] | None]:
    """Drop a category without annotations that is only the supercategory of all others, as Roboflow exports it.

    Returns:
        The other categories, and the one that was dropped.
    """
    used = {
        entry.get("category_id")
        for entry in annotations
        if isinstance(entry, dict) and is_int(entry.get("category_id"))
    }
    for key, category in categories.items():
        if category.get("supercategory") not in (None, "", "none"):
            continue
        others = [other for other in categories.values() if other is not category]
        if others and key not in used and all(other.get("supercategory") == category["name"] for other in others):
            validator.note(f"category {show(category['name'])} is only the supercategory of the others; dropped")
            return {other["id"]: other for other in others}, category
    return categories, None


def match_categories(checked: ValidatedCoco, categories: Sequence[Mapping[str, Any]], source: str) -> ValidatedCoco:
    """Return a dataset with the categories of another one; its classes are matched by name, and may be fewer.

    A dataset that has the same classes in the same order keeps its own category ids.

    Args:
        checked: the dataset.
        categories: categories of the other one, in the order of the model's classes.
        source: file that they are from, for messages.

    Raises:
        DatasetError: a class is not among them, or several have the same name.
    """
    names = [category["name"] for category in categories]
    if checked.class_names == names:
        return checked
    unknown = [name for name in checked.class_names if name not in names]
    if unknown:
        raise DatasetError(
            f"{checked.json_file} has classes that {source} does not have: {show(unknown)}. Classes are matched "
            f"by name; {source} has {show(names)}."
        )
    if len(set(names)) < len(names) or len(set(checked.class_names)) < len(checked.class_names):
        raise DatasetError(
            f"{checked.json_file} and {source} have several classes of the same name, which cannot be matched by name."
        )
    by_name = {category["name"]: category["id"] for category in categories}
    ids = {category["id"]: by_name[category["name"]] for category in checked.dataset["categories"]}
    own = {category["name"]: category for category in checked.dataset["categories"]}
    dataset = {
        **checked.dataset,
        "categories": [
            {**own.get(entry["name"], {}), "id": entry["id"], "name": entry["name"]} for entry in categories
        ],
        "annotations": [
            {**annotation, "category_id": ids[annotation["category_id"]]}
            for annotation in checked.dataset["annotations"]
        ],
    }
    note = f"{checked.json_file.name}: its {len(ids)} classes are matched by name with the {len(names)} of {source}"
    return dataclasses.replace(checked, dataset=dataset, notes=[*checked.notes, note], unchanged=False)


def restore_parent(train: ValidatedCoco, val: ValidatedCoco) -> ValidatedCoco:
    """Return training data with the category that was dropped as a mere parent, if the validation data has it."""
    parent = train.parent
    if parent is None or parent["name"] not in val.class_names:
        return train
    categories = sorted([*train.dataset["categories"], parent], key=lambda category: category["id"])
    return dataclasses.replace(train, dataset={**train.dataset, "categories": categories}, parent=None)


def register_validated(name: str, validated: ValidatedCoco, save_to: str | Path) -> None:
    """Save a validated dataset and register it with Detectron2.

    Registering the same ``name`` and ``save_to`` again replaces the earlier dataset.

    Args:
        name: name for ``cfg.DATASETS``.
        validated: result of :func:`validate_coco`.
        save_to: path of the cleaned json.

    Raises:
        DatasetError: another dataset has this name, or the json cannot be written.
    """
    if name in DatasetCatalog and MetadataCatalog.get(name).get("json_file") != str(save_to):
        raise DatasetError(f"dataset name {name!r} is taken. Fix: choose another name for {validated.json_file}.")
    validated.save(save_to)
    register_cleaned(name, save_to, validated.dataset, validated.image_dir)
