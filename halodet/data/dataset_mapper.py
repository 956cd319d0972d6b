"""Detectron2's mapper from dataset to model, which leaves out what cannot be used instead of stopping the run."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from halodet.data.annotations import validate_annotation
from halodet.data.bad_images import SKIPPED_KEY, Skipped, TooManyBadImages
from halodet.data.copy_paste import choose_objects, paste_objects
from halodet.data.image_io import read_image
from halodet.data.transforms import build_augmentations, crops_objects
from halodet.data.values import InvalidAnnotation
from halodet.errors import ImageError

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

_PATIENCE = 20  # images in a row
_BLANK = 32  # pixels along a side of what is evaluated in place of an image that cannot be used


class RobustDatasetMapper(DatasetMapper):
    """Maps one image's entry of a dataset, images being read as inference reads them (:func:`halodet.inference.read_image`).

    An image that cannot be read, whose size is not the one in the dataset, or none of whose annotations can be used, gives None while
    training, which has Detectron2 draw another one, and a blank image in an evaluation. A single annotation that cannot be used is left
    out. A sample tells what was left out, since the one before, under ``SKIPPED_KEY`` as a list of :class:`Skipped`.

    Args:
        is_train: whether annotations are wanted.
        others: the dataset's entries, from which copy-paste takes its second image.
        copy_paste: probability of pasting objects of another image; 0 for never.
        patience: unusable images in a row after which it gives up.

    Raises:
        TooManyBadImages: on that many calls in a row, nothing could be used.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        others: Sequence[dict[str, Any]] = (),
        copy_paste: float = 0.0,
        patience: int = _PATIENCE,
        **detectron2s: Any,
    ) -> None:
        super().__init__(is_train, **detectron2s)
        self.others = others
        self.copy_paste = copy_paste
        self.patience = patience
        self._skipped: list[Skipped] = []
        self._in_a_row = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True, others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Arguments for ``cfg``."""
        arguments = super().from_config(cfg, is_train)
        arguments["augmentations"] = build_augmentations(cfg, is_train)
        arguments["recompute_boxes"] = is_train and cfg.MODEL.MASK_ON and crops_objects(cfg)
        arguments["others"] = others
        if is_train and cfg.INPUT.COPY_PASTE.ENABLED:
            arguments["copy_paste"] = cfg.INPUT.COPY_PASTE.PROBABILITY
            arguments["instance_mask_format"] = (
                "bitmask"  # what is left of a half-covered object is no polygon of its own
            )
        # The share of unusable images is counted over all processes; that none at all can be used has to be noticed in each.
        if others:
            arguments["patience"] = len(others) if cfg.DATALOADER.MAX_BAD_IMAGES == 1 else min(_PATIENCE, len(others))
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Detectron2's sample for one entry of a dataset (``image`` uint8 (C, H, W), ``instances``, ...), or None; see the class."""
        try:
            sample = self._sample(dataset_dict)
        except InvalidAnnotation as error:
            return self._leave_out(dataset_dict, str(error))
        if self.copy_paste and np.random.uniform() < self.copy_paste:
            self._paste(sample)
        self._in_a_row = 0
        return self._noted(sample)

    def _leave_out(self, dataset_dict: dict[str, Any], reason: str) -> dict[str, Any] | None:
        self._skipped.append(Skipped(dataset_dict["file_name"], reason))
        if not self.is_train:
            sample = {key: dataset_dict[key] for key in ("file_name", "image_id") if key in dataset_dict}
            image = torch.zeros(len(self.image_format), _BLANK, _BLANK, dtype=torch.uint8)
            return self._noted({**sample, "image": image, "height": _BLANK, "width": _BLANK})
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            raise TooManyBadImages(
                f"{self._in_a_row} images in a row could not be used, the last one {dataset_dict['file_name']} ({reason}): "
                "check the images' folder, or the files with tools/check_dataset.py"
            )
        return None

    def _noted(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self._skipped:
            sample[SKIPPED_KEY] = self._skipped
            self._skipped = []
        return sample

    def _sample(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        dataset_dict = copy.deepcopy(dataset_dict)
        image = self._read(dataset_dict)
        if self.is_train and "annotations" in dataset_dict:
            dataset_dict["annotations"] = self._usable(dataset_dict)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image_shape = aug_input.image.shape[:2]
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif dataset_dict.get("annotations"):
            self._transform_annotations(dataset_dict, transforms, image_shape)
        elif "annotations" in dataset_dict:  # Detectron2 would look for masks to draw boxes around
            dataset_dict.pop("annotations")
            dataset_dict["instances"] = detection_utils.annotations_to_instances([], image_shape)
        return dataset_dict

    def _read(self, dataset_dict: dict[str, Any]) -> np.ndarray:
        """The image, (H, W, 3) uint8 in the model's order of channels."""
        path = dataset_dict["file_name"]
        try:
            image = read_image(PathManager.get_local_path(path))
            detection_utils.check_image_size(dataset_dict, image)
        except ImageError as error:
            raise InvalidAnnotation(_reason(str(error), path)) from error
        except detection_utils.SizeMismatchError as error:
            given = f"{dataset_dict['width']} x {dataset_dict['height']}"
            raise InvalidAnnotation(
                f"is {image.shape[1]} x {image.shape[0]} pixels (upright), and {given} in the dataset"
            ) from error
        except OSError as error:  # an address that cannot be fetched
            raise InvalidAnnotation(f"cannot be fetched ({error})") from error
        return np.ascontiguousarray(image[:, :, ::-1]) if self.image_format == "RGB" else image

    def _usable(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The annotations to learn from, crowds left out as Detectron2 does."""
        usable, wanted = [], 0
        for index, annotation in enumerate(dataset_dict["annotations"]):
            if annotation.get("iscrowd", 0):
                continue
            wanted += 1
            try:
                size = dataset_dict["width"], dataset_dict["height"]
                usable.append(validate_annotation(annotation, *size, need_mask=self.use_instance_mask))
            except InvalidAnnotation as error:
                self._skipped.append(Skipped(dataset_dict["file_name"], str(error), index))
        if wanted and not usable:
            # Without them its objects would be learned as background.
            raise InvalidAnnotation(f"none of its {wanted} annotations can be used")
        return usable

    def _paste(self, sample: dict[str, Any]) -> None:
        entry = self.others[np.random.randint(len(self.others))]
        try:
            other = self._sample(entry)
        except InvalidAnnotation as error:
            self._skipped.append(Skipped(entry["file_name"], str(error)))
            return
        objects: Instances = other["instances"]
        if len(objects):
            chosen = choose_objects(len(objects))
            sample["image"], sample["instances"] = paste_objects(
                sample["image"], sample["instances"], other["image"], objects, chosen
            )


def _reason(message: str, path: str) -> str:
    return message.removeprefix(os.fspath(path)).lstrip(": ").rstrip(".")
