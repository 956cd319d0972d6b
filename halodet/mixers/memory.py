"""Warning before an operator allocates much memory."""

import warnings

from halodet.utils.exporting import is_exporting

import torch

LIMIT = 1 << 30  # bytes
_warned: set[tuple[str, int]] = set()


def warn_memory(name: str, size: int) -> None:
    """Warn that the operator ``name`` is about to allocate ``size`` bytes, if that is more than 1 GiB.

    The warning comes once for each operator and power of two of bytes. Models that are traced, exported or compiled do
    not warn.
    """
    if torch.jit.is_tracing() or is_exporting() or torch.compiler.is_compiling() or size <= LIMIT:
        return
    if (name, size.bit_length()) not in _warned:
        _warned.add((name, size.bit_length()))
        warnings.warn(
            f"{name} needs about {size / 2**30:.1f} GiB (more than {LIMIT >> 30} GiB), because it compares all pairs "
            "of pixels. Fix: use it on smaller maps, or use local attention.",
            stacklevel=2,
        )
