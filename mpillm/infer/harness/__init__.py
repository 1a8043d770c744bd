"""Task files of lm-evaluation-harness over local data, scored by ranks with its figures."""
