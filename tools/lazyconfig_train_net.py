#!/usr/bin/env python3
"""Train and evaluate a detector of a LazyConfig, as Detectron2's tool of this name, with halodet's hooks.

    python tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_halo_h0.py train.max_iter=1000

Overrides are ``key=value``. Several processes and exit codes: as tools/train_net.py.
"""

from __future__ import annotations

import sys

import halodet.engine.main
from halodet.engine.lazy import run_lazy_config


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit code."""
    return halodet.engine.main.main(halodet.engine.main.argument_parser(__doc__).parse_args(argv), run_lazy_config)


if __name__ == "__main__":
    sys.exit(main())
