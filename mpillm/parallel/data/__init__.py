"""Data parallelism: every rank of the axis holds the same weights and a share of the batch."""
