"""Blocked local self-attention with a halo, as a function of tensors."""

from .halo import BORDERS, halo_attention

__all__ = ["BORDERS", "halo_attention"]
