"""Starting several processes as users do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def torchrun():
    """Run a script in two processes of this machine, without GPUs; returns (torchrun's exit code, everything that was printed)."""

    def start(*arguments, timeout=300, **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
        return run.returncode, run.stdout + run.stderr

    return start
