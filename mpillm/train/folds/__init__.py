"""Cross-validation: the runs of all folds and seeds in one job, and what they say together."""
