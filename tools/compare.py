#!/usr/bin/env python3
"""Train detectors with several seeds, and compare AP, parameters, multiply-adds, time and memory.

    python tools/compare.py --config-file configs/quick/mask_rcnn_halo_shapes.yaml --seeds 1 2 3 \\
        --variant elsa MODEL.HALONET.MIXERS "['conv','conv','elsa','elsa']" \\
        --variant conv MODEL.HALONET.MIXERS "['conv','conv','conv','conv']" \\
        --vary SOLVER.BASE_LR 0.0015 0.003 --output output/compare SOLVER.MAX_ITER 400

Each run is tools/train_net.py with OUTPUT_DIR DIR/NAME[/VALUE]/seedN. The same command continues an interrupted
comparison: finished runs are not repeated, others are resumed. A run that fails does not stop the others. Exit codes:
0 done, 1 a run failed, 2 an invalid argument or config, 74 a file cannot be written, 75 SIGTERM, 130 Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import halodet.benchmark.comparison.main
from halodet.engine import PREEMPTED


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit code."""
    train_net = Path(__file__).resolve().with_name("train_net.py")
    return halodet.benchmark.comparison.main.main(argv, __doc__, train_net)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # the current run saves a checkpoint
    sys.exit(main())
