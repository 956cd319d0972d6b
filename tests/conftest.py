"""Without a GPU the Triton kernels are interpreted. Triton reads that when it is first imported, so this comes before everything else."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
