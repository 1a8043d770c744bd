"""Leakage: evaluation rows in the training text, and training text in what a model writes."""
