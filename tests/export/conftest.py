"""Small detectors whose random weights find boxes of many places, sizes, classes and scores."""

from halodet.config import load_config
from halodet.inference import Predictor

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

TINY = (
    "MODEL.DEVICE cpu MODEL.HALONET.BASE_WIDTH 16 MODEL.HALONET.STEM_CHANNELS 16 MODEL.FPN.OUT_CHANNELS 32 "
    "INPUT.MIN_SIZE_TEST 96 INPUT.MAX_SIZE_TEST 160 TEST.DETECTIONS_PER_IMAGE 30"
).split()
SHAPES = "quick/mask_rcnn_halo_shapes.yaml"
DETECTORS = {
    "mask": (SHAPES, []),
    "faster": (SHAPES, ["MODEL.MASK_ON", "False"]),
    "cascade": (
        SHAPES,
        ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"],
    ),
    "retinanet": (
        "retinanet_halo_h4.yaml",
        [
            "MODEL.HALONET.VARIANT", "H0", "MODEL.HALONET.DEPTHS", "[1, 1, 1, 1]", "MODEL.HALONET.NORM", "GN",
            "MODEL.RETINANET.NUM_CONVS", "1", "DATASETS.TEST", "()", "MODEL.RETINANET.NUM_CLASSES", "6",
        ],
    ),
    "panoptic": ("quick/panoptic_fpn_halo_shapes.yaml", []),
}  # fmt: skip


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """Kind of detector -> (config, Predictor)."""
    made = {}

    def make(kind):
        if kind not in made:
            name, options = DETECTORS[kind]
            cfg = load_config(name, [*TINY, *options], train=False)
            torch.manual_seed(0)
            model = build_model(cfg)
            spread(model)
            folder = tmp_path_factory.mktemp(kind)
            DetectionCheckpointer(model, str(folder)).save("model_final")
            cfg = load_config(name, [*TINY, *options, "MODEL.WEIGHTS", str(folder / "model_final.pth")], train=False)
            made[kind] = cfg, Predictor(cfg)
        return made[kind]

    return make


@torch.no_grad()
def spread(model):
    """Scale the weights of the heads, so that boxes and scores differ."""
    for name, parameter in model.named_parameters():
        if "subnet" in name and parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter)
        for part, std in {
            "cls_score.weight": 0.3, "objectness_logits.weight": 0.1, "sem_seg_head.predictor.weight": 0.3,
            "mask_head.predictor.weight": 0.3, "bbox_pred.weight": 0.02, "anchor_deltas.weight": 0.02,
        }.items():  # fmt: skip
            if name.endswith(part):
                parameter.normal_(std=std)
        if name == "head.cls_score.weight":  # RetinaNet's sigmoid would saturate, and equal scores have no order
            parameter.normal_(std=0.06)
        if name == "head.cls_score.bias":
            parameter.fill_(-2.0)
