"""What several tests need."""

import os

import pytest
import torch

# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported, so it comes before everything else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine make small models and maps take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
