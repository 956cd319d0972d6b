"""Comparison of detectors over seeds: train, evaluate, and write tables and a chart."""
