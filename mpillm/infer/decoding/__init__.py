"""Texts that a model writes: greedy, sampled and by beams, and the answers of a whole split."""
