"""Check that the heads of a detector and its datasets fit the config, which training or evaluation would find late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halodet.config.keys import flatten, get_value, invalid
from halodet.data.classes import count_classes
from halodet.evaluation.build import get_evaluator_type

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import FCOS, GeneralizedRCNN, PanopticFPN, ProposalNetwork, RetinaNet, SemanticSegmentor
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils.file_io import PathManager
from torch import nn

# Predictions of Detectron2's meta-architectures. Nothing is assumed of those of other projects.
_PREDICTIONS = {
    GeneralizedRCNN: {"instances"},
    RetinaNet: {"instances"},
    FCOS: {"instances"},
    ProposalNetwork: {"proposals"},
    SemanticSegmentor: {"sem_seg"},
    PanopticFPN: {"instances", "sem_seg", "panoptic_seg"},
}
# Predictions that an evaluator reads; others read instances.
_EVALUATED = {
    "coco_panoptic_seg": {"instances", "sem_seg", "panoptic_seg"},
    "sem_seg": {"sem_seg"},
    "cityscapes_sem_seg": {"sem_seg"},
}


def check_heads(cfg: CfgNode, model: nn.Module) -> None:
    """Check the keys that Detectron2's meta-architectures ignore or cannot use.

    Args:
        cfg: the config.
        model: its model, which may be on the meta device.

    Raises:
        ConfigError: MASK_ON, KEYPOINT_ON, the anchor or proposal generator or a size of images is not what the model
            supports.
    """
    name, heads = type(model).__name__, getattr(model, "roi_heads", None)
    if type(model) in (RetinaNet, FCOS, SemanticSegmentor, ProposalNetwork):
        for key in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON"):
            if get_value(cfg, key):
                raise invalid(key, True, f"False with MODEL.META_ARCHITECTURE={name}, which has no such head")
    for part in (model, getattr(model, "proposal_generator", None)):
        anchors, boxes = getattr(part, "anchor_generator", None), getattr(part, "box2box_transform", None)
        if anchors and boxes and getattr(anchors, "box_dim", 4) != len(boxes.weights):
            expected = f"an anchor generator of {'' if len(boxes.weights) == 5 else 'un'}rotated boxes"
            raise invalid("MODEL.ANCHOR_GENERATOR.NAME", cfg.MODEL.ANCHOR_GENERATOR.NAME, expected)
    if isinstance(heads, Res5ROIHeads) and cfg.MODEL.KEYPOINT_ON:
        raise invalid("MODEL.KEYPOINT_ON", True, f"False with MODEL.ROI_HEADS.NAME={type(heads).__name__}")
    _check_group_norm(cfg, model)
    if getattr(model, "proposal_generator", model) is None:
        if isinstance(model, PanopticFPN | ProposalNetwork):
            raise invalid("MODEL.PROPOSAL_GENERATOR.NAME", cfg.MODEL.PROPOSAL_GENERATOR.NAME, f"RPN with {name}")
        if not cfg.MODEL.LOAD_PROPOSALS:
            raise invalid("MODEL.LOAD_PROPOSALS", False, "True without a proposal generator")


def _check_group_norm(cfg: CfgNode, model: nn.Module) -> None:
    """Check that maps have more than one pixel where a group norm has one channel per group, else PyTorch raises."""
    stride = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
            on_p7 = isinstance(model, RetinaNet) and name.startswith("head.")
            stride = max(stride, 128 if on_p7 else 32 if "fpn_" in name or name.startswith("sem_seg_head.") else 0)
    for key in ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", *["TEST.AUG.MIN_SIZES"] * cfg.TEST.AUG.ENABLED):
        if any(0 < size <= stride for size in flatten(get_value(cfg, key))):
            expected = f"more than {stride} pixels with group norm of one channel per group"
            raise invalid(key, get_value(cfg, key), expected)


def check_datasets(cfg: CfgNode, model: nn.Module, *, train: bool = True) -> None:
    """Check that the datasets have what the model learns and predicts; their metadata must be complete.

    Args:
        cfg: the config.
        model: its model, which may be on the meta device.
        train: also check DATASETS.TRAIN.

    Raises:
        ConfigError: classes, keypoints, proposals or expected results do not fit.
        DatasetError: a test dataset has no evaluator.
    """
    predictions = _PREDICTIONS.get(type(model))
    splits = {"TRAIN": cfg.DATASETS.TRAIN if train else (), "TEST": cfg.DATASETS.TEST}
    for name in splits["TEST"]:
        needed = _EVALUATED.get(get_evaluator_type(name), {"instances"})
        if predictions and not needed <= predictions | ({"instances"} if "proposals" in predictions else set()):
            found = f"MODEL.META_ARCHITECTURE={type(model).__name__}, which predicts {', '.join(sorted(predictions))}"
            expected = f"no {name}, which needs {', '.join(sorted(needed))}, with {found}"
            raise invalid("DATASETS.TEST", cfg.DATASETS.TEST, expected)
    if cfg.MODEL.LOAD_PROPOSALS:
        for split, names in splits.items():
            _check_proposals(f"DATASETS.PROPOSAL_FILES_{split}", cfg.DATASETS[f"PROPOSAL_FILES_{split}"], names)
    if predictions and "instances" in predictions and not isinstance(model, FCOS):
        key = "MODEL.RETINANET.NUM_CLASSES" if isinstance(model, RetinaNet) else "MODEL.ROI_HEADS.NUM_CLASSES"
        _check_count(key, count_classes(cfg), "thing_classes", splits)
    if predictions and "sem_seg" in predictions:
        _check_count("MODEL.SEM_SEG_HEAD.NUM_CLASSES", cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, "stuff_classes", splits)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg, splits)
    _check_expected_results(cfg, predictions, train)


def _check_proposals(key: str, files: Sequence[str], names: Sequence[str]) -> None:
    missing = [file for file in files if "://" not in file and not PathManager.exists(file)]
    if names and (len(files) != len(names) or missing):
        expected = f"a file for each of {', '.join(names)} with MODEL.LOAD_PROPOSALS"
        raise invalid(key, files, expected + (f"; {missing[0]} does not exist" if missing else ""))


def _check_count(key: str, count: int, metadata: str, splits: dict[str, Sequence[str]]) -> None:
    """Check the number of classes: all of a training dataset have an output, all outputs are a class of a test dataset.

    A dataset whose metadata is set when it is loaded may have none yet.
    """
    for split, names in splits.items():
        for name in names:
            classes = MetadataCatalog.get(name).get(metadata)
            if not classes or (split == "TEST" and get_evaluator_type(name) in ("lvis", "pascal_voc")):
                continue
            if count < len(classes) if split == "TRAIN" else count > len(classes):
                limit = "at least" if split == "TRAIN" else "at most"
                raise invalid(key, count, f"{limit} {len(classes)}, the number of classes of {name}")


def _check_keypoints(cfg: CfgNode, splits: dict[str, Sequence[str]]) -> None:
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for name in splits["TRAIN"]:
        names = MetadataCatalog.get(name).get("keypoint_names")
        if not names:
            raise invalid("MODEL.KEYPOINT_ON", True, f"False with {name}, which has no keypoint_names in its metadata")
        if len(names) != count:
            expected = f"{len(names)}, the number of keypoints of {name}"
            raise invalid("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", count, expected)
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    if splits["TEST"] and len(sigmas or range(17)) != count:  # pycocotools has those of COCO's 17 keypoints
        expected = f"{count} numbers, one for each of MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
        raise invalid("TEST.KEYPOINT_OKS_SIGMAS", sigmas, expected)


def _check_expected_results(cfg: CfgNode, predictions: set[str] | None, train: bool) -> None:
    results, key = cfg.TEST.EXPECTED_RESULTS, "TEST.EXPECTED_RESULTS"
    if results and len(cfg.DATASETS.TEST) != 1:
        raise invalid(key, results, f"[] with {len(cfg.DATASETS.TEST)} datasets in DATASETS.TEST")
    if not all(map(_is_result, results)):
        raise invalid(key, results, "lists of task, metric, value and tolerance, such as ['bbox', 'AP', 40.0, 0.5]")
    if not results or not predictions:
        return
    instances = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    tasks = [task for task, used in instances.items() if used] if "instances" in predictions else []
    tasks += ["box_proposals"] if "proposals" in predictions else sorted(predictions - {"instances"})
    tasks += [f"{task}_TTA" for task in tasks if cfg.TEST.AUG.ENABLED and not train]  # training compares before TTA
    if any(task not in tasks for task, *_ in results):
        raise invalid(key, results, f"tasks that are evaluated: {', '.join(tasks)}")


def _is_result(result: Any) -> bool:
    if not isinstance(result, (list, tuple)) or len(result) != 4:
        return False
    return all(isinstance(text, str) for text in result[:2]) and all(isinstance(n, (int, float)) for n in result[2:])
