"""Compute many texts at once: pages, scheduling, and the ranks' steps."""
