"""One file a verb: its options with their help, and what it runs."""
