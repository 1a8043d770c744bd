"""Trials of faults: what benchmarks/reliability.py is made of."""
