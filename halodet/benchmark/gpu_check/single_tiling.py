"""Run a module or script with one tiling per kernel, which saves the time to compile the others; a pytest plugin too.

python -m halodet.benchmark.gpu_check.single_tiling tools/train_net.py ...
pytest -p halodet.benchmark.gpu_check.single_tiling ...
"""

from __future__ import annotations

import runpy
import sys

from halodet.benchmark.gpu_check.tilings import limit_tilings


def pytest_configure() -> None:
    limit_tilings(1)


if __name__ == "__main__":
    limit_tilings(1)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
