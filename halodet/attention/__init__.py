"""Blocked local self-attention with a halo, as a function of tensors."""

from halodet.attention.functional import BACKENDS, BORDERS, halo_attention

__all__ = ["BACKENDS", "BORDERS", "halo_attention"]
