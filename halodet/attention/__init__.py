"""Blocked local self-attention with a halo, as a function of tensors."""

from .halo import BACKENDS, BORDERS, halo_attention

__all__ = ["BACKENDS", "BORDERS", "halo_attention"]
