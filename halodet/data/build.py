"""Train and test data loaders that skip images and annotations that cannot be used."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from halodet.data.annotations import show, validate_record
from halodet.data.bad_images import SKIPPED_KEY, SkipTrackingLoader
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.data.resumable_loader import ResumableTrainLoader, ignore_stop_signals
from halodet.errors import DatasetError

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, build_detection_test_loader, get_detection_dataset_dicts
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


def build_train_loader(cfg: CfgNode) -> SkipTrackingLoader:
    """Build the endless loader of DATASETS.TRAIN with Detectron2's samplers (DATALOADER.SAMPLER_TRAIN).

    Raises:
        DatasetError: see :func:`build_train_dataset`.
    """
    dataset, mapper = build_train_dataset(cfg)
    return SkipTrackingLoader(ResumableTrainLoader(cfg, mapper, dataset=dataset))


def build_train_dataset(cfg: CfgNode) -> tuple[DatasetFromList, RobustDatasetMapper]:
    """Load DATASETS.TRAIN, filtered as by Detectron2, remove its invalid annotations, and build its mapper.

    Raises:
        DatasetError: Detectron2 cannot read the datasets, or INPUT.MASK_FORMAT or copy-paste needs other masks.
    """
    names = cfg.DATASETS.TRAIN
    with wrap_dataset_errors(*names):
        records = get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        check_records(", ".join(names), records)
        check_masks(cfg, records)
        if not all(MetadataCatalog.get(name).get("validated", False) for name in names):
            for record in records:
                validate_record(record, need_mask=cfg.MODEL.MASK_ON)
            invalid = sum(len(record.get(SKIPPED_KEY, ())) for record in records)
            if invalid:
                logger.warning("Skipping %d invalid annotations of %s.", invalid, ", ".join(names))
    dataset = DatasetFromList(records, copy=False)
    return dataset, RobustDatasetMapper(cfg, is_train=True, others=dataset)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build Detectron2's loader of one test dataset.

    For COCO evaluation, an image that cannot be read becomes a blank, marked sample. Other evaluators cannot leave out
    an image, so there it is an error.
    """
    blanks = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco") == "coco"
    mapper = RobustDatasetMapper(cfg, is_train=False, blanks=blanks)
    loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
    loader.worker_init_fn = ignore_stop_signals if os.name == "posix" else None
    return loader


@contextlib.contextmanager
def wrap_dataset_errors(*names: str) -> Iterator[None]:
    """Raise the errors of Detectron2 while it reads these datasets as :class:`DatasetError`.

    Raises:
        DatasetError: with the file, the original message, and how to find the entry.
    """
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # the function that is registered for a dataset may raise anything
        files = [str(MetadataCatalog.get(name).get("json_file", "")) for name in names]
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        fix = "correct the function that DatasetCatalog.register got"
        if any(files):
            fix = "find the invalid entries with tools/check_dataset.py, or pass the file to --train-json or --val-json"
        raise DatasetError(
            f"Detectron2 cannot read {' and '.join(filter(None, files)) or ' and '.join(names)} "
            f"({type(error).__name__}: {reason}). Fix: {fix}."
        ) from error


def check_records(name: str, records: Any) -> None:
    """Check that a dataset is a list of dicts with ``file_name``, as Detectron2 expects.

    Raises:
        DatasetError: it is not.
    """
    if not isinstance(records, Sequence) or isinstance(records, str):
        raise DatasetError(f"dataset {name!r} is a {type(records).__name__}: expected a list of dicts")
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str | os.PathLike):
            found = f"without 'file_name': {sorted(record)}" if isinstance(record, dict) else f"{show(record)}"
            raise DatasetError(f"dataset {name!r}: entry {index} is {found}; expected a dict with 'file_name'")


def check_masks(cfg: CfgNode, records: Iterable[dict[str, Any]]) -> None:
    """Check that the training masks are of the type that INPUT.MASK_FORMAT and copy-paste need.

    Raises:
        DatasetError: they are not.
    """
    if cfg.INPUT.COPY_PASTE.ENABLED and any("sem_seg_file_name" in record for record in records):
        raise DatasetError(
            "INPUT.COPY_PASTE.ENABLED=True is invalid: expected False for a dataset with semantic segmentation."
        )
    if not cfg.MODEL.MASK_ON:
        return
    masks = [a.get("segmentation") for r in records for a in r.get("annotations", ()) if not a.get("iscrowd", 0)]
    rle, missing = sum(isinstance(mask, dict) for mask in masks), sum(not mask for mask in masks)
    names = ", ".join(cfg.DATASETS.TRAIN)
    if rle and cfg.INPUT.MASK_FORMAT == "polygon" and not cfg.INPUT.COPY_PASTE.ENABLED:
        raise DatasetError(
            f"INPUT.MASK_FORMAT='polygon' is invalid: {rle} of {len(masks)} masks of {names} are RLE. "
            "Fix: set it to 'bitmask', which accepts both."
        )
    if missing and cfg.INPUT.COPY_PASTE.ENABLED:
        raise DatasetError(
            f"INPUT.COPY_PASTE.ENABLED=True needs masks, but {missing} of {len(masks)} annotations of {names} "
            "have none. Fix: set it to False or add the masks."
        )
