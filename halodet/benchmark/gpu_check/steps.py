"""The steps of the GPU check, most valuable first."""

from __future__ import annotations

from typing import NamedTuple

TIME_LIMIT = 480  # seconds for all steps together


class Step(NamedTuple):
    """A module of this package with a function ``items``, see :mod:`.child`."""

    name: str
    module: str
    budget: float  # seconds; time that earlier steps leave is added
    measure: str  # what the worst number of the step is


STEPS = (
    Step("versions", "versions", 10, ""),
    Step("compilation", "compilation", 110, "registers spilled"),
    Step("correctness", "correctness", 80, "error / limit"),
    Step("equal-bits", "equal_bits", 25, "runs that differ"),
    Step("memory", "memory", 15, "MiB outside PyTorch's allocator"),
    Step("execution", "execution", 20, "largest difference"),
    Step("sanitizer", "sanitizer", 30, "errors"),
    Step("kernel-timing", "kernel_timing", 25, "ms"),
    Step("layer-timing", "layer_timing", 55, "time / time of timm"),
    Step("gpu-tests", "gpu_tests", 60, "failed tests"),
    Step("training", "training", 40, "s per iteration"),
)


def find_step(name: str) -> Step:
    """Return the step of a name."""
    return next(step for step in STEPS if step.name == name)
