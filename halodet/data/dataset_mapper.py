"""Detectron2's dataset mapper, which skips images that cannot be used instead of stopping the run."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from halodet.data.annotations import InvalidAnnotation
from halodet.data.bad_images import SKIPPED_KEY, Skipped, TooManyBadImages
from halodet.data.copy_paste import choose_objects, paste_objects
from halodet.data.transforms import build_augmentations
from halodet.errors import ImageError
from halodet.utils.image_io import read_image

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager

_MAX_CONSECUTIVE = 20
_BLANK = 32  # pixels; side of the image evaluated in place of one that cannot be read


class RobustDatasetMapper(DatasetMapper):
    """Map a dataset dict to a sample; images are read by :func:`halodet.utils.image_io.read_image`.

    An image is skipped if it cannot be read, its size differs from the dataset's, or all of its annotations are
    invalid. In training a skipped image maps to None, for which the loader draws another image; in evaluation it maps
    to a blank image. Each sample lists what was skipped since the previous one under ``SKIPPED_KEY``.

    Annotations are expected to be valid: see :func:`halodet.data.annotations.validate_record`.

    Args:
        is_train: whether to map annotations.
        others: dataset dicts from which copy-paste takes its second image.
        blanks: whether an image that cannot be read maps to a blank one in evaluation; otherwise it is an error.
        copy_paste: probability of pasting objects of a second image.
        max_consecutive: number of consecutive skipped images that is an error.

    Raises:
        TooManyBadImages: ``max_consecutive`` images in a row were skipped in training.
        ImageError: an image cannot be read in evaluation and ``blanks`` is False.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        others: Sequence[dict[str, Any]] = (),
        blanks: bool = True,
        copy_paste: float = 0.0,
        max_consecutive: int = _MAX_CONSECUTIVE,
        **kwargs: Any,
    ) -> None:
        super().__init__(is_train, **kwargs)
        self.others = others
        self.blanks = blanks
        self.copy_paste = copy_paste
        self.max_consecutive = max_consecutive
        self._skipped: list[Skipped] = []
        self._consecutive = 0

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool = True, others: Sequence[dict[str, Any]] = (), blanks: bool = True
    ) -> dict[str, Any]:
        """Return the constructor arguments for ``cfg``."""
        kwargs = super().from_config(cfg, is_train)
        kwargs["augmentations"] = build_augmentations(cfg, is_train)
        crops_objects = cfg.INPUT.CROP.ENABLED or cfg.INPUT.LSJ.ENABLED
        kwargs["recompute_boxes"] = is_train and cfg.MODEL.MASK_ON and crops_objects
        kwargs["others"], kwargs["blanks"] = others, blanks
        if is_train and cfg.INPUT.COPY_PASTE.ENABLED:
            kwargs["copy_paste"] = cfg.INPUT.COPY_PASTE.PROBABILITY
            kwargs["instance_mask_format"] = "bitmask"  # the visible part of an occluded object is not one polygon
        # The fraction of skipped images is counted over all ranks; a rank without any usable image must notice itself.
        if others:
            limit = len(others) if cfg.DATALOADER.MAX_BAD_IMAGES == 1 else min(_MAX_CONSECUTIVE, len(others))
            kwargs["max_consecutive"] = limit
        return kwargs

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Return Detectron2's sample (``image`` uint8 (C, H, W), ``instances``, ...), or None; see the class."""
        try:
            sample = self._map(dataset_dict)
        except InvalidAnnotation as error:
            return self._skip(dataset_dict, str(error))
        if self.copy_paste and np.random.uniform() < self.copy_paste:
            self._paste(sample)
        self._consecutive = 0
        return self._with_skipped(sample)

    def _skip(self, dataset_dict: dict[str, Any], reason: str) -> dict[str, Any] | None:
        self._skipped.append(Skipped(dataset_dict["file_name"], reason))
        if not self.is_train and not self.blanks:
            raise ImageError(
                f"{dataset_dict['file_name']} {reason}. Fix: repair the file or remove it from the dataset."
            )
        if not self.is_train:
            sample = {key: dataset_dict[key] for key in ("file_name", "image_id") if key in dataset_dict}
            image = torch.zeros(len(self.image_format), _BLANK, _BLANK, dtype=torch.uint8)
            return self._with_skipped({**sample, "image": image, "height": _BLANK, "width": _BLANK})
        self._consecutive += 1
        if self._consecutive >= self.max_consecutive:
            raise TooManyBadImages(
                f"{self._consecutive} images in a row could not be used, the last one {dataset_dict['file_name']} "
                f"({reason}). Fix: correct the image folder, or find the bad files with tools/check_dataset.py."
            )
        return None

    def _with_skipped(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self._skipped:
            sample[SKIPPED_KEY] = self._skipped
            self._skipped = []
        return sample

    def _map(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        dataset_dict = copy.deepcopy(dataset_dict)
        image = self._read(dataset_dict)
        invalid = dataset_dict.pop(SKIPPED_KEY, [])
        annotations = dataset_dict.pop("annotations", None)
        if self.is_train and annotations is not None:
            self._skipped += invalid
            annotations = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
            if invalid and not annotations:  # without annotations its objects would be learned as background
                raise InvalidAnnotation(f"all of its {len(invalid)} annotations are invalid")
        sem_seg_file = dataset_dict.pop("sem_seg_file_name", None)
        sem_seg = self._read_sem_seg(sem_seg_file, image) if self.is_train and sem_seg_file else None
        aug_input = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(aug_input)
        image_shape = aug_input.image.shape[:2]
        if sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(aug_input.sem_seg.astype("long"))
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk)
        if self.is_train and annotations:
            dataset_dict["annotations"] = annotations
            self._transform_annotations(dataset_dict, transforms, image_shape)
        elif self.is_train and annotations is not None:  # Detectron2 would recompute boxes from masks that do not exist
            dataset_dict["instances"] = detection_utils.annotations_to_instances([], image_shape)
        return dataset_dict

    def _read(self, dataset_dict: dict[str, Any]) -> np.ndarray:
        """Return the image, (H, W, 3) uint8 in the model's channel order."""
        path = dataset_dict["file_name"]
        try:
            image = read_image(PathManager.get_local_path(path))
            detection_utils.check_image_size(dataset_dict, image)
        except ImageError as error:
            raise InvalidAnnotation(str(error).removeprefix(os.fspath(path)).lstrip(": ").rstrip(".")) from error
        except detection_utils.SizeMismatchError as error:
            raise InvalidAnnotation(
                f"is {image.shape[1]} x {image.shape[0]} pixels after EXIF rotation, expected "
                f"{dataset_dict['width']} x {dataset_dict['height']} from the dataset"
            ) from error
        except OSError as error:  # a URL that cannot be downloaded
            raise InvalidAnnotation(f"cannot be downloaded ({error})") from error
        return np.ascontiguousarray(image[:, :, ::-1]) if self.image_format == "RGB" else image

    def _read_sem_seg(self, path: str, image: np.ndarray) -> np.ndarray:
        """Return the class of each pixel of ``image``, (H, W) uint8."""
        try:
            labels = detection_utils.read_image(path, "L").squeeze(2)
        except (OSError, SyntaxError, ValueError) as error:
            raise InvalidAnnotation(f"has unreadable labels {path} ({error})") from error
        if labels.shape != image.shape[:2]:
            size = f"{labels.shape[1]} x {labels.shape[0]}"
            raise InvalidAnnotation(f"is {image.shape[1]} x {image.shape[0]} pixels, but its labels {path} are {size}")
        return labels

    def _paste(self, sample: dict[str, Any]) -> None:
        record = self.others[np.random.randint(len(self.others))]
        try:
            other = self._map(record)
        except InvalidAnnotation as error:
            self._skipped.append(Skipped(record["file_name"], str(error)))
            return
        if len(other["instances"]):
            chosen = choose_objects(len(other["instances"]))
            sample["image"], sample["instances"] = paste_objects(
                sample["image"], sample["instances"], other["image"], other["instances"], chosen
            )
