"""Evaluators and test-time augmentation."""
