#!/usr/bin/env python3
"""Check halodet on an NVIDIA GPU; see halodet/benchmark/gpu_check/main.py, or --help."""

import signal
import sys

from halodet.benchmark.gpu_check.main import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # end the processes of the running step
    sys.exit(main())
