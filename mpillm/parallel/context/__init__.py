"""The context axis: ranks that share the positions of each sequence."""
