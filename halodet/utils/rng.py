"""The states of the random number generators that training draws from: Python's, numpy's, PyTorch's on the CPU and on each GPU."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states as they are, in plain containers and tensors that a checkpoint can hold."""
    _, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": {"words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(key.astype(np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`capture` found; those of GPUs that are not here are left out."""
    python, own = state["python"], state["numpy"]
    random.setstate((3, tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        ("MT19937", own["key"].numpy().astype(np.uint32), own["position"], own["has_gauss"], own["cached"])
    )
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, the CPU's generators draw what ``key`` decides, and nothing else; outside, they go on as if nothing had been drawn.

    Args:
        key: numbers from 0; each sequence of them is a stream of its own.
    """
    before = random.getstate()
    numpy_before, torch_before = np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(
        int(seeds[2]) << 31 | int(seeds[3]) >> 1
    )  # the CPU's alone: a GPU's belongs to the model
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
        torch.set_rng_state(torch_before)
