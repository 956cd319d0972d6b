"""Blocked local self-attention with a halo, as a function of tensors."""

from .halo import halo_attention

__all__ = ["halo_attention"]
