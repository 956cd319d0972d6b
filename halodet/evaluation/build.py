"""Build the evaluators of a dataset."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from halodet.errors import DatasetError
from halodet.evaluation.coco import RobustCOCOEvaluator
from halodet.evaluation.panoptic import PanopticEvaluator

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from PIL import Image

_ONE_FILE_EVALUATORS = {
    "cityscapes_instance": CityscapesInstanceEvaluator,
    "cityscapes_sem_seg": CityscapesSemSegEvaluator,
    "pascal_voc": PascalVOCDetectionEvaluator,
}
EVALUATOR_TYPES = ("coco", "coco_panoptic_seg", "lvis", "sem_seg", *_ONE_FILE_EVALUATORS)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """Build the evaluators for the ``evaluator_type`` of a dataset, as Detectron2's tools/train_net.py does.

    Args:
        cfg: config.
        dataset_name: name of a registered dataset; without ``evaluator_type`` it is evaluated as COCO instances.
        output_folder: folder of the predictions; OUTPUT_DIR/inference by default.

    Raises:
        DatasetError: the type is unknown, or its evaluator cannot be built for this dataset.
    """
    evaluator_type = get_evaluator_type(dataset_name)
    output = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluators: list[DatasetEvaluator] = []
    try:
        if evaluator_type in _ONE_FILE_EVALUATORS:
            evaluators.append(_ONE_FILE_EVALUATORS[evaluator_type](dataset_name))
        if evaluator_type in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(
                SemSegEvaluator(dataset_name, distributed=True, output_dir=output, sem_seg_loading_fn=_read_labels)
            )
        if evaluator_type in ("coco", "coco_panoptic_seg"):
            # Detectron2's faster COCO evaluation fails if nothing is detected in the whole dataset; this one does not.
            evaluators.append(
                RobustCOCOEvaluator(
                    dataset_name,
                    output_dir=output,
                    use_fast_impl=False,
                    kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
                    report_dir=cfg.OUTPUT_DIR,
                    default_tasks=("bbox", *(["segm"] * cfg.MODEL.MASK_ON), *(["keypoints"] * cfg.MODEL.KEYPOINT_ON)),
                    detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
                )
            )
        if evaluator_type == "coco_panoptic_seg":
            has_panopticapi = importlib.util.find_spec("panopticapi") is not None
            evaluators.append(
                COCOPanopticEvaluator(dataset_name, output) if has_panopticapi else PanopticEvaluator(dataset_name)
            )
        if evaluator_type == "lvis":
            evaluators.append(LVISEvaluator(dataset_name, output_dir=output))
    except (AttributeError, AssertionError, ImportError, KeyError) as error:  # metadata or a package is missing
        raise DatasetError(
            f"dataset {dataset_name!r}: cannot build its evaluator for evaluator_type={evaluator_type!r} "
            f"({type(error).__name__}: {error})."
        ) from error
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def get_evaluator_type(dataset_name: str) -> str:
    """Return the ``evaluator_type`` of a registered dataset, ``"coco"`` if it has none.

    Raises:
        DatasetError: the type is unknown.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type not in EVALUATOR_TYPES:
        raise DatasetError(
            f"dataset {dataset_name!r}: evaluator_type={evaluator_type!r} is unknown: expected one of "
            f"{', '.join(EVALUATOR_TYPES)}. Fix: override Trainer.build_evaluator."
        )
    return evaluator_type


def _read_labels(path: str, dtype: Any) -> np.ndarray:
    """Read a label image; Detectron2's own function fails with NumPy 2."""
    with Image.open(path) as image:
        return np.array(image, dtype=dtype)
