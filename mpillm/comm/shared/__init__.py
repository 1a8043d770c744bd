"""Shared memory of a node: segments, and the collectives that run in them."""
