"""The names and dataset ids of the classes a detector was trained on."""

from __future__ import annotations

import json
import os
from typing import Any

from halodet.errors import HalodetError
from halodet.utils.io import write_json

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

__all__ = ["CLASSES_FILE", "ClassesError", "read_classes", "write_classes"]

CLASSES_FILE = "classes.json"


class ClassesError(HalodetError, ValueError):
    """A class list that does not fit the model; the message is one sentence."""


def read_classes(cfg: CfgNode) -> list[dict[str, Any]]:
    """Find the classes of the configured model as ``{"id": dataset id, "name": name}``, in the order of the model's outputs.

    They are looked for in ``classes.json`` beside ``cfg.MODEL.WEIGHTS``, then in the metadata of ``cfg.DATASETS.TEST[0]`` when it
    holds as many names as the model has classes; failing both they are called "class 0", "class 1", ...

    Raises:
        ClassesError: ``classes.json`` is there but malformed, or has another number of classes than the model.
    """
    count = (
        cfg.MODEL.RETINANET.NUM_CLASSES
        if cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
        else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    )
    path = os.path.join(os.path.dirname(cfg.MODEL.WEIGHTS), CLASSES_FILE)
    if cfg.MODEL.WEIGHTS and os.path.isfile(path):
        return _from_file(path, count)
    return _from_metadata(cfg, count) or [{"id": index, "name": f"class {index}"} for index in range(count)]


def write_classes(path: str | os.PathLike[str], classes: list[dict[str, Any]]) -> None:
    """Write the classes, ``{"id": int, "name": str}`` in the order of the model's outputs, where :func:`read_classes` finds them.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(path, [{"id": int(entry["id"]), "name": str(entry["name"])} for entry in classes])


def _from_file(path: str, count: int) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            classes = json.load(file)
    except (OSError, ValueError) as error:
        raise ClassesError(
            f"{path} cannot be read ({error}); put back the file that training wrote, or remove it."
        ) from error
    if not isinstance(classes, list) or not all(_is_class(entry) for entry in classes):
        raise ClassesError(
            f'{path} is not a list of {{"id": number, "name": text}}; put back the file that training wrote, or remove it.'
        )
    if len(classes) != count:
        raise ClassesError(
            f"{path} names {len(classes)} classes but the model has {count}; use the config that these weights were trained with."
        )
    if len({entry["id"] for entry in classes}) != count:
        raise ClassesError(f"{path} gives the same id to several classes; put back the file that training wrote.")
    return [{"id": entry["id"], "name": entry["name"]} for entry in classes]


def _is_class(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("name"), str)


def _from_metadata(cfg: CfgNode, count: int) -> list[dict[str, Any]] | None:
    # Asked by list(), because MetadataCatalog.get() would register a misspelt name.
    if not cfg.DATASETS.TEST or cfg.DATASETS.TEST[0] not in MetadataCatalog.list():
        return None
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    names = metadata.get("thing_classes", None)
    if names is None or len(names) != count:
        return None
    ids = {index: dataset_id for dataset_id, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    return [{"id": ids.get(index, index), "name": name} for index, name in enumerate(names)]
