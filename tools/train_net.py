#!/usr/bin/env python3
"""Train and evaluate a detector. Flags, logs and file layout are those of Detectron2's tools/train_net.py.

Several processes are started by torchrun, srun or --num-gpus. Exit codes: 0 done, 2 invalid config, data or weights,
70 non-finite loss, 74 a file cannot be written, 75 preempted by SIGTERM or SIGUSR1 (continue with --resume).
"""

from __future__ import annotations

import sys

import halodet.engine.main


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit code."""
    return halodet.engine.main.main(halodet.engine.main.argument_parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
