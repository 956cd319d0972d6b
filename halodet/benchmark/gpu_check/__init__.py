"""Bring-up check of the Triton kernels on a GPU, in steps that run in processes of their own."""
