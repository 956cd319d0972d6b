"""Random states of Python, NumPy and PyTorch (CPU and GPUs): capture, restore and seed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Return the random states in plain containers and tensors that a checkpoint can hold."""
    _, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state()
    words_of_numpy = torch.from_numpy(np.array(key, np.int64))
    state: dict[str, Any] = {
        "python": {"words": torch.tensor(words), "gauss": gauss},
        "numpy": {"key": words_of_numpy, "position": position, "has_gauss": has_gauss, "cached": cached},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Restore the random states that :func:`capture` returned; states of GPUs that are not present are ignored."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((3, tuple(python["words"].tolist()), python["gauss"]))
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the CPU's random generators from ``key`` inside the context, and restore their states afterwards.

    Args:
        key: non-negative integers; each sequence gives an independent random stream.
    """
    before = random.getstate()
    numpy_before, torch_before = np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]) << 31 | int(seeds[3]) >> 1)  # not torch.manual_seed: CPU only
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
        torch.set_rng_state(torch_before)
