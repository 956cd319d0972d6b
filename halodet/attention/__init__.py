"""Blocked local self-attention with a halo (HaloNet) as a function of tensors; needs PyTorch only."""

from halodet.attention.functional import BACKENDS, BORDERS, halo_attention

__all__ = ["BACKENDS", "BORDERS", "halo_attention"]
