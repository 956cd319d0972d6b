"""Benchmarks of attention layers and models against other implementations."""
