"""Checks of the arguments of mixers; each raises ValueError with the name, the value and what is expected."""

from collections.abc import Sequence

from halodet.attention import BACKENDS


def check_integer(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError if ``value`` is not an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is invalid: expected an integer of at least {least}")


def check_kernel_size(kernel_size: int) -> None:
    """Raise ValueError if ``kernel_size`` is not an odd integer."""
    check_integer("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is invalid: expected an odd number of pixels")


def check_block(block_size: int, halo_size: int) -> None:
    """Raise ValueError if a block has no pixel, or a halo less than none."""
    check_integer("block_size", block_size)
    check_integer("halo_size", halo_size, 0)


def check_heads(num_heads: int, *channels: int) -> None:
    """Raise ValueError if the heads do not divide each of the numbers of channels."""
    check_integer("num_heads", num_heads)
    if any(count % num_heads for count in channels):
        counts = " and of ".join(map(str, dict.fromkeys(channels)))
        raise ValueError(f"num_heads={num_heads} is invalid: expected a divisor of {counts} channels")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError if ``value`` is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is invalid: expected one of {', '.join(map(str, choices))}")


def check_backend(backend: str) -> None:
    """Raise ValueError if there is no such attention backend."""
    check_choice("backend", backend, ["auto", *sorted(BACKENDS)])
