"""The class names and dataset category ids of a trained detector, in classes.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halodet.errors import DatasetError
from halodet.utils.io import write_json

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig

CLASSES_FILE = "classes.json"


class ClassesError(DatasetError):
    """The class list does not fit the model."""


def count_classes(cfg: CfgNode | DictConfig) -> int:
    """Return the number of classes of the instances that the model of a config, or of a LazyConfig, detects."""
    if isinstance(cfg, DictConfig):
        return cfg.model.get("roi_heads", cfg.model).get("num_classes", 0)
    is_retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    return cfg.MODEL.RETINANET.NUM_CLASSES if is_retinanet else cfg.MODEL.ROI_HEADS.NUM_CLASSES


def read_classes(cfg: CfgNode | DictConfig) -> list[dict[str, Any]]:
    """Return the classes of the model of a config, or of a LazyConfig; see :func:`find_classes`."""
    if isinstance(cfg, DictConfig):
        name = cfg.dataloader.test.get("dataset", {}).get("names", "")
        return find_classes(cfg.train.init_checkpoint, count_classes(cfg), name if isinstance(name, str) else "")
    return find_classes(cfg.MODEL.WEIGHTS, count_classes(cfg), next(iter(cfg.DATASETS.TEST), ""))


def find_classes(weights: str, count: int, dataset_name: str = "") -> list[dict[str, Any]]:
    """Return the classes of a model as ``{"id": category id, "name": name}``, in the order of its outputs.

    They are read from ``classes.json`` in the folder of ``weights``, else from the metadata of a dataset if the number
    of classes fits, else they are named "class 0", "class 1", ...

    Args:
        weights: path of the weights; may be empty.
        count: number of classes of the model.
        dataset_name: name of the dataset that it is evaluated on; may be empty.

    Raises:
        ClassesError: ``classes.json`` is malformed, or has another number of classes than the model.
    """
    classes = saved_classes(weights)
    if classes and len(classes) != count:
        path = os.path.join(os.path.dirname(weights), CLASSES_FILE)
        raise ClassesError(
            f"{path} has {len(classes)} classes, but the model has {count}. Fix: use the config of these weights."
        )
    if classes:
        return classes
    return _from_metadata(dataset_name, count) or [{"id": index, "name": f"class {index}"} for index in range(count)]


def saved_classes(weights: str) -> list[dict[str, Any]] | None:
    """Return the classes in ``classes.json`` beside the weights, None if there is no such file.

    Raises:
        ClassesError: it is malformed.
    """
    path = os.path.join(os.path.dirname(weights), CLASSES_FILE)
    return _from_file(path) if weights and os.path.isfile(path) else None


def write_classes(path: str | os.PathLike[str], classes: list[dict[str, Any]]) -> None:
    """Write the classes, ``{"id": int, "name": str}`` in the order of the model's outputs.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(path, [{"id": int(entry["id"]), "name": str(entry["name"])} for entry in classes])


def check_classes(
    weights: str, count: int, dataset_names: Iterable[str], trained: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Check that the datasets of an evaluation have the classes, in the order, that the model was trained on.

    Args:
        weights: path of the weights.
        count: number of classes of the model.
        dataset_names: names of the datasets.
        trained: classes that the checkpoint names; without them those of ``classes.json`` beside the weights, and
            without that, nothing is checked.

    Raises:
        ClassesError: a dataset has other classes, or ``classes.json`` does not fit the model.
    """
    if not trained and not os.path.isfile(os.path.join(os.path.dirname(weights), CLASSES_FILE)):
        return
    names = [entry["name"] for entry in trained or find_classes(weights, count)]
    for name in dataset_names:
        classes = dataset_classes(name)
        if classes and [entry["name"] for entry in classes] != names:
            found = [entry["name"] for entry in classes]
            raise ClassesError(f"Dataset {name} has the classes {found}, but {weights} was trained on {names}.")


def dataset_classes(dataset_name: str) -> list[dict[str, Any]] | None:
    """Return the classes ``{"id": category id, "name": name}`` of a registered dataset; None if it names none."""
    if dataset_name not in MetadataCatalog.list():  # MetadataCatalog.get() would register a misspelled name
        return None
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get("thing_classes")
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names or ()))}
    first = {index: dataset_id for dataset_id, index in reversed(ids.items())}  # several ids may be one class
    return [{"id": first[index], "name": names[index]} for index in sorted(first)] if names else None


def save_classes(dataset_name: str, output_dir: str) -> None:
    """Write the classes of a dataset to ``classes.json`` in ``output_dir``: the demo finds them beside the weights.

    Nothing is written for a dataset without ``thing_classes``.
    """
    classes = dataset_classes(dataset_name)
    if classes:
        write_classes(os.path.join(output_dir, CLASSES_FILE), classes)


def _from_file(path: str) -> list[dict[str, Any]]:
    fix = "Fix: restore the file that training wrote, or delete it."
    try:
        with open(path, encoding="utf-8") as file:
            classes = json.load(file)
    except (OSError, ValueError) as error:
        raise ClassesError(f"{path} cannot be read ({error}). {fix}") from error
    if not isinstance(classes, list) or not classes or not all(_is_class(entry) for entry in classes):
        raise ClassesError(f'{path} is invalid: expected a list of {{"id": number, "name": text}}. {fix}')
    if len({entry["id"] for entry in classes}) != len(classes):
        raise ClassesError(f"{path} has several classes with the same id. {fix}")
    return [{"id": entry["id"], "name": entry["name"]} for entry in classes]


def _is_class(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("name"), str)


def _from_metadata(dataset_name: str, count: int) -> list[dict[str, Any]] | None:
    if dataset_name not in MetadataCatalog.list():  # MetadataCatalog.get() would register a misspelled name
        return None
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get("thing_classes", None)
    if names is None or len(names) != count:
        return None
    ids = {index: dataset_id for dataset_id, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    return [{"id": ids.get(index, index), "name": name} for index, name in enumerate(names)]
