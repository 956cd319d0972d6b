"""Warnings about Detectron2's own calls, on which users cannot act."""

from __future__ import annotations

import logging
import warnings


def ignore_detectron2_warnings() -> None:
    """Ignore PyTorch's warnings about calls within Detectron2, in this process; for command line tools."""
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", module="detectron2")
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
