#!/usr/bin/env python3
"""Check halodet on an NVIDIA GPU; see halodet/benchmark/gpu_check/main.py, or --help."""

import sys

from halodet.benchmark.gpu_check.main import main

if __name__ == "__main__":
    sys.exit(main())
