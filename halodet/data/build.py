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
from halodet.utils.gc_pause import paused_gc

from detectron2 import data
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, get_detection_dataset_dicts
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

# Labels that Detectron2's meta-architectures learn.
_LABELS = {
    "GeneralizedRCNN": ("annotations",),
    "PanopticFPN": ("annotations", "sem_seg_file_name"),
    "ProposalNetwork": ("annotations",),
    "RetinaNet": ("annotations",),
    "SemanticSegmentor": ("sem_seg_file_name",),
}


def build_train_loader(cfg: CfgNode) -> SkipTrackingLoader:
    """Build the endless loader of DATASETS.TRAIN with Detectron2's samplers (DATALOADER.SAMPLER_TRAIN).

    Raises:
        DatasetError: see :func:`build_train_dataset`.
    """
    dataset, mapper = build_train_dataset(cfg)
    return SkipTrackingLoader(ResumableTrainLoader(cfg, mapper, dataset=dataset))


def build_train_dataset(cfg: CfgNode) -> tuple[DatasetFromList, RobustDatasetMapper]:
    """Load DATASETS.TRAIN with :func:`load_train_dataset` and build its mapper.

    Raises:
        DatasetError: see :func:`load_train_dataset`.
    """
    dataset = load_train_dataset(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        need_mask=cfg.MODEL.MASK_ON,
        mask_format=cfg.INPUT.MASK_FORMAT,
        copy_paste=cfg.INPUT.COPY_PASTE.ENABLED,
    )
    _check_labels(cfg, dataset)
    return dataset, RobustDatasetMapper(cfg, is_train=True, others=dataset)


@paused_gc()
def load_train_dataset(
    names: str | Sequence[str],
    *,
    need_mask: bool = False,
    mask_format: str = "bitmask",
    copy_paste: bool = False,
    **kwargs: Any,
) -> DatasetFromList:
    """Load registered datasets as Detectron2's ``get_detection_dataset_dicts``, and mark their invalid annotations.

    Args:
        names: name of a dataset, or several.
        need_mask: whether an annotation without a usable mask is invalid.
        mask_format: masks that the mapper makes: ``"polygon"``, or ``"bitmask"``, for which a mask may also be RLE.
        copy_paste: whether the mapper pastes objects of other images, for which every annotation needs a mask.
        **kwargs: further arguments of ``get_detection_dataset_dicts``.

    Raises:
        DatasetError: Detectron2 cannot read the datasets, or the masks are of another type.
    """
    names = [names] if isinstance(names, str) else list(names)
    with wrap_dataset_errors(*names):
        records = get_detection_dataset_dicts(names, **kwargs)
        check_records(", ".join(names), records)
        if copy_paste or (need_mask and mask_format == "polygon"):
            _check_masks(", ".join(names), records, need_mask=need_mask, copy_paste=copy_paste)
        if not all(MetadataCatalog.get(name).get("validated", False) for name in names):
            for record in records:
                validate_record(record, need_mask=need_mask)
            invalid = sum(len(record.get(SKIPPED_KEY, ())) for record in records)
            if invalid:
                logger.warning("Skipping %d invalid annotations of %s.", invalid, ", ".join(names))
    return DatasetFromList(records, copy=False)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build Detectron2's loader of one test dataset.

    For COCO evaluation, an image that cannot be read becomes a blank, marked sample. Other evaluators cannot leave out
    an image, so there it is an error.
    """
    blanks = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco") == "coco"
    mapper = RobustDatasetMapper(cfg, is_train=False, blanks=blanks)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


def build_detection_test_loader(*args: Any, **kwargs: Any) -> DataLoader:
    """Build a loader with Detectron2's function of this name; its workers outlive a stop signal to all processes."""
    loader = data.build_detection_test_loader(*args, **kwargs)
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


def _check_labels(cfg: CfgNode, records: Iterable[dict[str, Any]]) -> None:
    """Check that all images have the labels that Detectron2's meta-architectures learn."""
    for label in _LABELS.get(cfg.MODEL.META_ARCHITECTURE, ()):
        missing = sum(label not in record for record in records)
        if missing:
            raise DatasetError(
                f"DATASETS.TRAIN={cfg.DATASETS.TRAIN} is invalid: expected {label!r} in all records with "
                f"MODEL.META_ARCHITECTURE={cfg.MODEL.META_ARCHITECTURE}, {missing} have none."
            )


def _check_masks(names: str, records: Iterable[dict[str, Any]], *, need_mask: bool, copy_paste: bool) -> None:
    """Check that the masks fit INPUT.MASK_FORMAT=polygon or copy-paste."""
    if copy_paste and any("sem_seg_file_name" in record for record in records):
        raise DatasetError(
            "INPUT.COPY_PASTE.ENABLED=True is invalid: expected False for a dataset with semantic segmentation."
        )
    if not need_mask:
        return
    masks = [a.get("segmentation") for r in records for a in r.get("annotations", ()) if not a.get("iscrowd", 0)]
    rle, missing = sum(isinstance(mask, dict) for mask in masks), sum(not mask for mask in masks)
    if rle and not copy_paste:
        raise DatasetError(
            f"INPUT.MASK_FORMAT='polygon' is invalid: {rle} of {len(masks)} masks of {names} are RLE. "
            "Fix: set it (in a LazyConfig the mapper's instance_mask_format) to 'bitmask', which accepts both."
        )
    if missing and copy_paste:
        raise DatasetError(
            f"INPUT.COPY_PASTE.ENABLED=True needs masks, but {missing} of {len(masks)} annotations of {names} "
            "have none. Fix: set it to False or add the masks."
        )
