"""Detectron2's meta-architectures on the halo backbone: training, evaluation, saving and resuming."""

import copy

from halodet.config import load_config
from halodet.data import register_shape_layouts
from halodet.data.synthetic_shapes import NUM_IMAGES
from halodet.engine import Trainer
from halodet.engine.resume_state import ResumeState

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.utils.env import seed_all_rng
from helpers import differences, read_metrics

TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.HALONET.BASE_WIDTH", "16", "MODEL.HALONET.DEPTHS", "(1, 1, 1, 1)",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "0", "SOLVER.CHECKPOINT_PERIOD", "2",
    "TEST.DETECTIONS_PER_IMAGE", "5", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SEED", "3",
    "SOLVER.BASE_LR", "0.001",
]  # fmt: skip
RUNS = {
    "panoptic": ("quick/panoptic_fpn_halo_shapes", [], {"panoptic_seg/PQ", "sem_seg/mIoU", "bbox/AP", "segm/AP"}),
    "semantic": ("quick/semantic_fpn_halo_shapes", [], {"sem_seg/mIoU"}),
    "keypoint": ("quick/keypoint_rcnn_halo_shapes", [], {"bbox/AP", "keypoints/AP"}),
    "cascade": ("quick/mask_rcnn_halo_shapes", ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"], {"bbox/AP", "segm/AP"}),
    "proposals": ("quick/mask_rcnn_halo_shapes", ["MODEL.META_ARCHITECTURE", "ProposalNetwork",
                  "MODEL.MASK_ON", "False"], {"box_proposals/AR@100"}),
}  # fmt: skip
# Built, saved and loaded without training, as their data or heads need more than the tiny scenes have.
POINT_REND = ["MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "",
              "MODEL.ROI_MASK_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION", "7",
              "MODEL.ROI_MASK_HEAD.IN_FEATURES", "('p2',)", "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", "True",
              "MODEL.POINT_HEAD.IN_FEATURES", "('p2',)", "MODEL.POINT_HEAD.NUM_CLASSES", "80"]  # fmt: skip
DEEPLAB = ["MODEL.META_ARCHITECTURE", "PanopticDeepLab", "MODEL.BACKBONE.NAME", "build_halonet_backbone",
           "MODEL.HALONET.OUTPUT_STRIDE", "16", "MODEL.SEM_SEG_HEAD.NAME", "PanopticDeepLabSemSegHead",
           "MODEL.SEM_SEG_HEAD.IN_FEATURES", "('res2', 'res3', 'res5')", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "4",
           "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", "('res2', 'res3')", "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", "(8, 8)",
           "MODEL.INS_EMBED_HEAD.IN_FEATURES", "('res2', 'res3', 'res5')", "MODEL.INS_EMBED_HEAD.COMMON_STRIDE", "4",
           "MODEL.INS_EMBED_HEAD.PROJECT_FEATURES", "('res2', 'res3')",
           "MODEL.INS_EMBED_HEAD.PROJECT_CHANNELS", "(8, 8)", "MODEL.SEM_SEG_HEAD.NORM", "BN",
           "MODEL.INS_EMBED_HEAD.NORM", "BN", "MODEL.MASK_ON", "False"]  # fmt: skip
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_halonet_fpn_backbone",
             "MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "MODEL.MASK_ON", "False"]  # fmt: skip


def add_deeplab(cfg):
    module = pytest.importorskip("detectron2.projects.panoptic_deeplab", reason="it needs panopticapi")
    module.add_panoptic_deeplab_config(cfg)


BUILT = {
    "PointRend": (POINT_REND, add_pointrend_config),
    "Panoptic-DeepLab": (DEEPLAB, add_deeplab),
    "RetinaNet": (RETINANET, None),
}


@pytest.fixture(scope="module", autouse=True)
def few_shapes(tmp_path_factory):
    """The datasets of the shapes with layouts, of four images."""
    usual = MetadataCatalog.get("halodet_shapes_keypoints_val").image_root.removesuffix("/val")
    with pytest.MonkeyPatch.context() as patch:
        for split in NUM_IMAGES:
            patch.setitem(NUM_IMAGES, split, 4)
        register_shape_layouts(tmp_path_factory.mktemp("few"))
        yield
        register_shape_layouts(usual)


@pytest.mark.parametrize("name", RUNS)
def test_trains_resumes_and_is_evaluated(name, tool, tmp_path):
    config, opts, expected = RUNS[name]
    if config == "quick/mask_rcnn_halo_shapes":
        for split in ("train", "val"):
            key = "DATASETS.TEST" if split == "val" else "DATASETS.TRAIN"
            opts = [*opts, key, f"('halodet_shapes_keypoints_{split}',)"]
    command = [f"--config-file={config}", "OUTPUT_DIR", str(tmp_path), *TINY, *opts]
    assert tool(command) == 0
    written = {key: value for line in read_metrics(tmp_path) for key, value in line.items()}
    assert expected <= written.keys() and written["total_loss"] > 0
    whole = torch.load(tmp_path / "model_final.pth", weights_only=True)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert tool(["--resume", *command]) == 0
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)
    for one in (whole, again):
        del one["trainer"]["hooks"]["ResumeState"]["started"]
    assert differences(whole, again) == []


@pytest.mark.parametrize("name", BUILT)
def test_state_is_saved_and_restored(name, tmp_path):
    opts, add_config = BUILT[name]
    cfg = load_config(
        "quick/mask_rcnn_halo_small",
        [*TINY, "OUTPUT_DIR", str(tmp_path), *opts],
        add_configs=[add_config] if add_config else [],
    )
    seed_all_rng(0)
    first, second = Trainer.build_model(cfg), build_model(cfg)
    state = copy.deepcopy(ResumeState(None, first, 2, {}).state_dict())
    torch.save({"model": first.state_dict(), "hooks": state}, tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=True)
    second.load_state_dict(loaded["model"])
    ResumeState(None, second, 2, {}).load_state_dict(loaded["hooks"])
    assert differences(first.state_dict(), second.state_dict()) == []
    assert any(name.startswith("backbone") and "rel" in name for name in loaded["model"]), "no attention"
