"""HaloNet backbones for Detectron2.

``import halodet`` registers the backbones, the ``shapes`` dataset and ``timm://`` paths with Detectron2 where it is
installed, unless the environment variable ``HALODET_REGISTER`` is 0. The names in ``__all__`` are imported on first
use; import submodules by their names. :mod:`halodet.attention`,
:mod:`halodet.mixers` and :mod:`halodet.models` need only torch and torchvision, and :class:`ExportedPredictor` needs
neither.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING

from halodet.utils.import_errors import explain_import_errors, is_installed, lazy_names
from halodet.utils.threads import set_thread_defaults

if TYPE_CHECKING:
    from halodet.attention import halo_attention
    from halodet.backbones import TimmBackbone
    from halodet.checkpoint import load_weights
    from halodet.config.defaults import add_halodet_config
    from halodet.config.load import load_config
    from halodet.engine import Trainer
    from halodet.inference import ExportedPredictor, Predictor
    from halodet.mixers import build_mixer, register_mixer
    from halodet.models import HaloNet

__version__ = "0.1.0"
__all__ = [
    "ExportedPredictor",
    "HaloNet",
    "Predictor",
    "TimmBackbone",
    "Trainer",
    "add_halodet_config",
    "build_mixer",
    "halo_attention",
    "load_config",
    "load_weights",
    "register_mixer",
]

_MODULES = {
    "ExportedPredictor": "inference",
    "HaloNet": "models",
    "Predictor": "inference",
    "TimmBackbone": "backbones",
    "Trainer": "engine",
    "add_halodet_config": "config.defaults",
    "build_mixer": "mixers",
    "halo_attention": "attention",
    "load_config": "config.load",
    "load_weights": "checkpoint",
    "register_mixer": "mixers",
}


__getattr__, __dir__ = lazy_names(globals(), _MODULES)


def _register_with_detectron2() -> None:
    with explain_import_errors(), warnings.catch_warnings():
        # Detectron2 uses the deprecated torch.jit.script at import
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        for room in ("backbones", "checkpoint", "data"):
            importlib.import_module(f"halodet.{room}")


set_thread_defaults()  # before PyTorch is imported

# collect_env reports a broken Detectron2, so it must be able to start with one.
_registers = os.environ.get("HALODET_REGISTER") != "0" and "halodet.utils.collect_env" not in sys.orig_argv
if _registers and is_installed("torch") and is_installed("detectron2"):
    _register_with_detectron2()
