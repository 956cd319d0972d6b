"""Data loaders of a run, around the mapper that leaves out what cannot be used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from halodet.data.bad_images import SkipTrackingLoader
from halodet.data.dataset_mapper import RobustDatasetMapper
from halodet.data.resumable_loader import ResumableTrainLoader, go_on
from halodet.errors import DatasetError

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, build_detection_test_loader, get_detection_dataset_dicts
from torch.utils.data import DataLoader


def build_train_loader(cfg: CfgNode) -> SkipTrackingLoader:
    """The endless stream of DATASETS.TRAIN, with Detectron2's samplers (DATALOADER.SAMPLER_TRAIN), counting what is left out.

    Raises:
        DatasetError: as :func:`training_data`.
    """
    dataset, mapper = training_data(cfg)
    return SkipTrackingLoader(ResumableTrainLoader(cfg, mapper, dataset=dataset))


def training_data(cfg: CfgNode) -> tuple[DatasetFromList, RobustDatasetMapper]:
    """The entries of DATASETS.TRAIN, those that Detectron2 leaves out being gone, and what makes samples of them.

    Raises:
        DatasetError: Detectron2 cannot read them, or the masks are not of the kind that INPUT.MASK_FORMAT, or copy-paste, needs.
    """
    with wrap_dataset_errors(*cfg.DATASETS.TRAIN):
        entries = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    check_masks(cfg, entries)
    dataset = DatasetFromList(entries, copy=False)
    return dataset, RobustDatasetMapper(cfg, is_train=True, others=dataset)


@contextlib.contextmanager
def wrap_dataset_errors(*names: str) -> Iterator[None]:
    """Tell in one sentence what Detectron2, reading the datasets of these names, stops on.

    Raises:
        DatasetError: with what it says, and how to find the entry.
    """
    try:
        yield
    except DatasetError:
        raise
    except (AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        files = [str(MetadataCatalog.get(name).get("json_file", "")) for name in names]
        what = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        raise DatasetError(
            f"Detectron2 cannot read {' and '.join(filter(None, files)) or ' and '.join(names)} ({what or type(error).__name__}): "
            "tools/check_dataset.py names the entries that are wrong, and --train-json and --val-json take those that are right"
        ) from error


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Detectron2's loader of one dataset to evaluate on; an image that cannot be used is blank in it, and says so."""
    loader = build_detection_test_loader(cfg, dataset_name, mapper=RobustDatasetMapper(cfg, is_train=False))
    loader.worker_init_fn = go_on if os.name == "posix" else None
    return loader


def check_masks(cfg: CfgNode, entries: Iterable[dict[str, Any]]) -> None:
    """Check that the masks to learn from are there where copy-paste wants them, and of a kind that INPUT.MASK_FORMAT takes.

    Raises:
        DatasetError: they are not; the message is one sentence.
    """
    if not cfg.MODEL.MASK_ON:
        return
    rle, without, total = 0, 0, 0
    for annotation in (a for entry in entries for a in _learned(entry.get("annotations", ()))):
        mask = annotation.get("segmentation")
        total += 1
        rle += isinstance(mask, dict)
        without += not mask
    names = ", ".join(cfg.DATASETS.TRAIN)
    if rle and cfg.INPUT.MASK_FORMAT == "polygon" and not cfg.INPUT.COPY_PASTE.ENABLED:
        raise DatasetError(
            f"{rle} of {total} masks of {names} are RLE, and INPUT.MASK_FORMAT is polygon: set it to bitmask, which takes both"
        )
    if without and cfg.INPUT.COPY_PASTE.ENABLED:
        raise DatasetError(
            f"INPUT.COPY_PASTE.ENABLED needs masks, and {without} of {total} annotations of {names} have none: "
            "set it to False, or add the masks"
        )


def _learned(annotations: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return (annotation for annotation in annotations if not annotation.get("iscrowd", 0))
