"""Metrics of an evaluation, NumPy only. One metric is one file."""
