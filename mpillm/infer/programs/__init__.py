"""Programs that a model wrote: run in a sandbox, and scored by those that pass their tests."""
