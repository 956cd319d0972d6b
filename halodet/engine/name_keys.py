"""Name the config keys in the error of a model that cannot be built: its constructors know their arguments only."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from halodet.backbones.build import TIMM_BACKBONES
from halodet.config.keys import get_value, invalid
from halodet.errors import ConfigError

from detectron2.config import CfgNode

CANNOT_BUILD = "Cannot build the model of this config"

_RENAMED = {"window": "WINDOW_SIZE", "position": "REL_POS_MODE"}  # arguments that are not named as their key
_REGISTRIES = {  # of Detectron2
    "META_ARCH": "MODEL.META_ARCHITECTURE",
    "BACKBONE": "MODEL.BACKBONE.NAME",
    "PROPOSAL_GENERATOR": "MODEL.PROPOSAL_GENERATOR.NAME",
    "ANCHOR_GENERATOR": "MODEL.ANCHOR_GENERATOR.NAME",
    "RPN_HEAD": "MODEL.RPN.HEAD_NAME",
    "ROI_HEADS": "MODEL.ROI_HEADS.NAME",
    "ROI_BOX_HEAD": "MODEL.ROI_BOX_HEAD.NAME",
    "ROI_MASK_HEAD": "MODEL.ROI_MASK_HEAD.NAME",
    "ROI_KEYPOINT_HEAD": "MODEL.ROI_KEYPOINT_HEAD.NAME",
    "SEM_SEG_HEADS": "MODEL.SEM_SEG_HEAD.NAME",
}
_FILES = {  # of Detectron2, with the node that they read
    "anchor_generator.py": "MODEL.ANCHOR_GENERATOR",
    "box_head.py": "MODEL.ROI_BOX_HEAD",
    "cascade_rcnn.py": "MODEL.ROI_HEADS and MODEL.ROI_BOX_CASCADE_HEAD",
    "fast_rcnn.py": "MODEL.ROI_BOX_HEAD",
    "fpn.py": "MODEL.FPN and of the backbone",
    "keypoint_head.py": "MODEL.ROI_KEYPOINT_HEAD",
    "mask_head.py": "MODEL.ROI_MASK_HEAD",
    "resnet.py": "MODEL.RESNETS",
    "retinanet.py": "MODEL.RETINANET",
    "roi_heads.py": "MODEL.ROI_HEADS",
    "rpn.py": "MODEL.RPN",
    "semantic_seg.py": "MODEL.SEM_SEG_HEAD",
}


def name_keys(cfg: CfgNode, error: ConfigError) -> ConfigError:
    """Return the error with the key of an argument or name, or else the config node of the part that is built."""
    message = str(error).removeprefix(f"{CANNOT_BUILD}: ")
    argument = re.match(r"(\w+)=", message)
    node = "HALODET_TIMM" if cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES else "HALONET"
    name = _RENAMED.get(argument[1], argument[1].upper()) if argument else None
    if argument and name in cfg.MODEL[node]:
        return ConfigError(f"MODEL.{node}.{name}{message[argument.end(1) :]}")
    unknown = re.fullmatch(r"No object named '(.*)' found in '(\w+)' registry!", message)
    key = _REGISTRIES.get(unknown[2]) if unknown else None
    if unknown and key and get_value(cfg, key) == unknown[1]:
        return invalid(key, repr(unknown[1]), f"a name in Detectron2's {unknown[2]} registry")
    frames = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    files = [Path(frame.filename).name for frame in reversed(frames)]
    part = next((_FILES[file] for file in files if file in _FILES), None)
    return ConfigError(f"{str(error).rstrip('.!')}. Fix: check the keys of {part}.") if part else error
