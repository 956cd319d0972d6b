"""Build the evaluator of a dataset."""

from __future__ import annotations

import os

from halodet.errors import DatasetError
from halodet.evaluation.coco import RobustCOCOEvaluator

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str = "inference") -> DatasetEvaluator:
    """Build the evaluator for the ``evaluator_type`` of a dataset.

    Args:
        cfg: config.
        dataset_name: name of a registered dataset.
        folder: folder inside OUTPUT_DIR for predictions.

    Raises:
        DatasetError: the type is not supported.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type != "coco":
        raise DatasetError(
            f"dataset {dataset_name!r}: evaluator_type={evaluator_type!r} is not supported: expected 'coco'."
        )
    # Detectron2's faster COCO evaluation fails if nothing is detected in the whole dataset; the official one does not.
    return RobustCOCOEvaluator(
        dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, folder), use_fast_impl=False, report_dir=cfg.OUTPUT_DIR
    )
