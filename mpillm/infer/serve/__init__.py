"""Serve a model over HTTP: an engine on all ranks, and an API on rank 0."""
