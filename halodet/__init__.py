"""halodet: HaloNet backbones for Detectron2. Importing it registers the backbones and the built-in dataset with Detectron2."""

import warnings

__version__ = "0.1.0"

try:
    with warnings.catch_warnings():
        # Detectron2 uses torch.jit.script at import; PyTorch's remark on that is nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        from . import data
        from .backbones import HaloNet
        from .config import add_halodet_config
except ImportError as error:
    # `python -m halodet.doctor` must run, and say what is missing, where PyTorch or Detectron2 is not there or does not import.
    warnings.warn(f"halodet is not usable ({error}): run 'python -m halodet.doctor' for the mend", stacklevel=2)
    data = HaloNet = add_halodet_config = None

__all__ = ["HaloNet", "add_halodet_config", "data"]
