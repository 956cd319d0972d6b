"""What is checked of a detector and its datasets before a run starts."""

import re

from halodet.engine.check_detector import check_datasets
from halodet.engine.startup import build_meta_model
from halodet.errors import ConfigError, DatasetError

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import cached_config

NAME = "test_check_detector"
MASK, KEYPOINT = "quick/mask_rcnn_halo_small", "quick/keypoint_rcnn_halo_shapes"
PANOPTIC, SEMANTIC = "quick/panoptic_fpn_halo_shapes", "quick/semantic_fpn_halo_shapes"
RETINANET = [
    "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_halonet_fpn_backbone",
    "MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']",
]  # fmt: skip
THINGS, STUFF = ["a", "b", "c"], ["x", "y"]


def message(config, opts, metadata=(), train=True):
    """The message of the ConfigError for a config and a dataset with some metadata; empty without one."""
    names = ["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)"]
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2]
    cfg = cached_config(config, "MODEL.DEVICE", "cpu", *names, *classes, *opts)
    DatasetCatalog.register(NAME, list)
    try:
        MetadataCatalog.get(NAME).set(**dict(metadata))
        check_datasets(cfg, build_meta_model(cfg), train=train)
    except ConfigError as error:
        return str(error)
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    return ""


@pytest.mark.parametrize(
    ("config", "opts", "metadata", "expected"),
    [
        (MASK, [], {}, ""),
        (MASK, [], {"thing_classes": THINGS}, ""),
        (MASK, ["MODEL.ROI_HEADS.NUM_CLASSES", 2], {"thing_classes": THINGS}, "ROI_HEADS.NUM_CLASSES=2 .* at least 3"),
        (MASK, ["MODEL.ROI_HEADS.NUM_CLASSES", 4], {"thing_classes": THINGS}, "ROI_HEADS.NUM_CLASSES=4 .* at most 3"),
        (MASK, ["MODEL.KEYPOINT_ON", True], {}, "KEYPOINT_ON=True .* keypoint_names"),
        (MASK, ["MODEL.MASK_ON", False, *RETINANET], {}, ""),
        (MASK, RETINANET, {}, "MODEL.MASK_ON=True .*=RetinaNet, which has no such head"),
        (
            MASK,
            ["MODEL.MASK_ON", False, *RETINANET, "MODEL.RETINANET.NUM_CLASSES", 1],
            {"thing_classes": THINGS},
            "MODEL.RETINANET.NUM_CLASSES=1",
        ),
        (MASK, ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.MASK_ON", False], {}, ""),
        (MASK, [], {"evaluator_type": "sem_seg"}, "DATASETS.TEST.*GeneralizedRCNN, which predicts instances"),
        (MASK, [], {"evaluator_type": "coco_panoptic_seg"}, "DATASETS.TEST.*needs instances, panoptic_seg, sem_seg"),
        (PANOPTIC, [], {"evaluator_type": "coco_panoptic_seg", "stuff_classes": STUFF}, ""),
        (PANOPTIC, ["TEST.AUG.ENABLED", True], {}, "TEST.AUG.ENABLED=True .* PanopticFPN"),
        (SEMANTIC, [], {"evaluator_type": "sem_seg", "stuff_classes": STUFF}, ""),
        (SEMANTIC, [], {"evaluator_type": "sem_seg", "stuff_classes": THINGS}, "SEM_SEG_HEAD.NUM_CLASSES=2"),
        (SEMANTIC, [], {}, "DATASETS.TEST.*needs instances"),
        (KEYPOINT, [], {"keypoint_names": list("abcd")}, ""),
        (KEYPOINT, [], {"keypoint_names": THINGS}, "ROI_KEYPOINT_HEAD.NUM_KEYPOINTS=4 .* expected 3"),
        (
            KEYPOINT,
            ["TEST.KEYPOINT_OKS_SIGMAS", "[]"],
            {"keypoint_names": list("abcd")},
            "TEST.KEYPOINT_OKS_SIGMAS=.* 4 numbers",
        ),
        (MASK, ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], {}, "MODEL.LOAD_PROPOSALS=False"),
        (MASK, ["MODEL.LOAD_PROPOSALS", True], {}, "DATASETS.PROPOSAL_FILES_TRAIN"),
        (
            MASK,
            ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", "('gone.pkl',)"],
            {},
            "gone.pkl does not exist",
        ),
        (PANOPTIC, ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], {}, "expected RPN with PanopticFPN"),
        (MASK, ["INPUT.MIN_SIZE_TEST", 32, "MODEL.FPN.OUT_CHANNELS", 64], {}, ""),
        (MASK, ["INPUT.MIN_SIZE_TEST", 32, "MODEL.FPN.OUT_CHANNELS", 32], {}, "INPUT.MIN_SIZE_TEST=32 .* group norm"),
        (PANOPTIC, ["INPUT.MAX_SIZE_TEST", 20], {"evaluator_type": "coco_panoptic_seg"}, "INPUT.MAX_SIZE_TEST=20"),
        (MASK, ["MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"], {}, "ANCHOR_GENERATOR.NAME=.*unrotated"),
        (MASK, ["TEST.EXPECTED_RESULTS", "[['segm', 'AP', 30.0, 0.5]]"], {}, ""),
        (MASK, ["TEST.EXPECTED_RESULTS", "[['keypoints', 'AP', 30, 1]]"], {}, "expected tasks .*: bbox, segm"),
        (MASK, ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 30.0]]"], {}, "lists of task, metric, value and tolerance"),
        (
            MASK,
            ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 30, 1]]", "DATASETS.TEST", "()"],
            {},
            r"expected \[\] with 0 datasets",
        ),
    ],
)
def test_datasets_fit_the_detector(config, opts, metadata, expected):
    found = message(config, opts, metadata)
    assert re.search(expected, found) if expected else not found
    assert "\n" not in found


def test_an_evaluation_does_not_check_the_training_data():
    opts = ["DATASETS.TRAIN", "('gone',)", "TEST.AUG.ENABLED", True, "TEST.EXPECTED_RESULTS"]
    assert not message(MASK, [*opts, "[['bbox_TTA', 'AP', 30, 1]]"], train=False)
    assert "expected tasks" in message(MASK, [*opts, "[['bbox_TTA', 'AP', 30, 1]]"])


def test_an_unknown_evaluator_is_found_before_training():
    with pytest.raises(DatasetError, match="evaluator_type='own' is unknown"):
        message(MASK, [], {"evaluator_type": "own"})


def test_proposal_files_may_be_urls():
    opts = ["MODEL.LOAD_PROPOSALS", True, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
    urls = ("detectron2://proposals/none.pkl",)
    files = ["DATASETS.PROPOSAL_FILES_TRAIN", urls, "DATASETS.PROPOSAL_FILES_TEST", urls]
    assert message(MASK, [*opts, *files], {"thing_classes": THINGS}) == ""
    files[1] = ("no/such/file.pkl",)
    assert "no/such/file.pkl" in message(MASK, [*opts, *files], {"thing_classes": THINGS})
