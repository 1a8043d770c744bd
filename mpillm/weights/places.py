"""Where a run's checkpoints lie: names alone, so that whoever only looks need not load torch."""

CHECKPOINTS = "checkpoints"
INDEX = "index.json"
